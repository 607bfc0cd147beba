"""`l2r2 predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import errors, say, show_shares, track

METADATA_BOXES = "the boxes in a folder's metadata.csv/.jsonl"


def predict(
    model: Annotated[str, typer.Argument(help="A run's folder, or a Hub id (org/name).")],
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, or a data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .json, .jsonl, .csv or .parquet; the same command continues it.")],
    boxes: Annotated[Optional[Path], typer.Option(help="Box file.", show_default=METADATA_BOXES)] = None,
    localizer: Annotated[
        Optional[str], typer.Option(help="Find the boxes so, see `l2r2 localize`; `head` is the model's own box head.")
    ] = None,
    topk_prompts: Annotated[
        Optional[int], typer.Option(min=1, help="Ask the localizer for so many classes that the whole image suggests.")
    ] = None,
    adapt: Annotated[
        str,
        typer.Option(
            help="Fuse the images of one place together: group:COLUMN (of the metadata), folder, batch:N, or off. Worth it "
            "where photos come in sites: how many backgrounds mislead there is estimated without labels."
        ),
    ] = "off",
    split: Annotated[Optional[str], typer.Option(help="Only this split of a data set.")] = None,
    box_threshold: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Boxes with a lower score are not used.", show_default="the model's")
    ] = None,
    max_objects: Annotated[int, typer.Option(min=1, help="Boxes of an image to classify, best first.")] = 10,
    top: Annotated[int, typer.Option(min=1, help="Classes listed with each object.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Classify images; each object gets an answer and the reason for it. Unreadable files are kept as failures."""
    from l2r2_models.predict.predict_files import gather, predict_to_file
    from l2r2_models.predict.predictor import Predictor

    if localizer is not None and boxes is not None:
        raise typer.BadParameter("--localizer finds the boxes, --boxes gives them: leave one of both out")
    inputs = gather(images, boxes, split)
    if localizer is not None:
        inputs = inputs.without_boxes()
    predictor = Predictor.from_pretrained(
        model,
        box_threshold=box_threshold,
        max_objects=max_objects,
        batch_size=batch_size,
        top=top,
        localizer=localizer,
        topk_prompts=topk_prompts,
    )
    if predictor.model.finds_object and (inputs.entries or inputs.masks):
        errors.print("this model finds its object itself; boxes and masks are not used")
    meant_for = predictor.checkpoint.localizer.get("spec")
    if meant_for and not inputs.entries and localizer is None:
        hint = f"no boxes are given, the whole image answers; this model is meant for those of --localizer {meant_for}"
        errors.print(hint)
    report = predict_to_file(predictor, inputs, out, lambda items, total: track(items, total, "predicting"), adapt)
    for image in report.failures[:10]:
        errors.print(f"failed: {image['failure']}")
    if unlocalized := report.localizer_failures:
        why = f"the localizer failed on {len(unlocalized)} of {report.total} images; the first: {unlocalized[0]}"
        errors.print(why)
    sources = report.sources
    again = f", {report.kept} of them from before" if report.kept else ""
    because = f" ({len(unlocalized)} because the localizer failed)" if unlocalized else ""
    say(
        f"{report.total} images{again}: {sources.total()} answers, {sources['fused']} with an object found, "
        f"{sources['full']} from the whole image{because}; {len(report.failures)} failed"
    )
    show_shares(report.shares)
    say(f"wrote {out}")
    if report.failures or (unlocalized and localizer is not None):  # the same command tries these again
        raise typer.Exit(1)

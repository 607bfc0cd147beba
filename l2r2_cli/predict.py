"""`l2r2 predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .common import count, errors, on_ray, say, show_shares, track
from .options import (
    Abstain,
    Address,
    BatchSize,
    Boxes,
    Cascade,
    Classes,
    Engine,
    Format,
    Geofence,
    Localizer,
    MaxObjects,
    Metadata,
    Precision,
    Prior,
    Region,
    Rollup,
    Run,
    Split,
    Taxonomy,
    Top,
    Workers,
    box_threshold,
)

if TYPE_CHECKING:
    from l2r2_models.boxes import BoxTable


def predict(
    model: Run,
    images: Annotated[
        list[Path], typer.Argument(help="Images, folders, data sets, patterns, lists of them (.txt), or - for a list on stdin.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File to write: .json, .jsonl, .csv or .parquet; with --engine ray, a folder. Rerun to resume."
        ),
    ],
    format: Format = None,
    boxes: Boxes = None,
    frames: Annotated[
        Optional[Path],
        typer.Option(help="Folder to write frames of videos to, those with a box in MegaDetector's output for videos (--boxes)."),
    ] = None,
    localizer: Localizer = None,
    topk_prompts: Annotated[
        Optional[int], typer.Option(min=1, help="Prompt the localizer with this many classes that the whole image suggests.")
    ] = None,
    adapt: Annotated[
        str,
        typer.Option(
            help="Fuse images taken at the same place jointly: group:COLUMN (of the metadata), folder, sequence:SECONDS (photos "
            "with no longer gap, by EXIF time), batch:N, or off. The fraction of misleading backgrounds per place is estimated "
            "without labels."
        ),
    ] = "off",
    group: Annotated[
        Optional[str],
        typer.Option(
            help="Also give one prediction per group of images: sequence:SECONDS (photos of a folder with no longer gap, by EXIF "
            "time; sequence:SECONDS:COLUMN within a metadata column), folder, or a metadata column."
        ),
    ] = None,
    split: Split = None,
    box_threshold: Annotated[Optional[float], box_threshold("the model's, usually 0.2")] = None,
    max_objects: MaxObjects = 10,
    top: Top = 3,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    precision: Precision = "fp32",
    cascade: Cascade = None,
    image_rule: Annotated[
        str,
        typer.Option(
            help="Prediction for the image: best (of the first object), weighted (the most confident of full and all objects, "
            "weighted by box score), or full."
        ),
    ] = "best",
    classes: Classes = None,
    geofence: Geofence = None,
    region: Region = None,
    taxonomy: Taxonomy = None,
    rollup: Rollup = None,
    abstain: Abstain = None,
    prior: Prior = None,
    metadata: Metadata = None,
    store_logits: Annotated[
        bool,
        typer.Option("--store-logits", help="Keep the branch logits, so that `l2r2 fuse --predictions` can fuse them again."),
    ] = False,
    engine: Engine = "local",
    address: Address = None,
) -> None:
    """Classify images; every object gets a prediction and the reason for it. Unreadable files are listed as failures."""
    from l2r2_models.boxes import read_boxes
    from l2r2_models.predict.inputs import gather
    from l2r2_models.predict.predict_files import predict_to_file
    from l2r2_models.predict.predictor import Predictor
    from l2r2_models.predict.rule_files import rules_for, with_prior
    from l2r2_models.predict.rules import Rules

    if localizer is not None and boxes is not None:
        raise typer.BadParameter("--localizer finds the boxes and --boxes reads them from a file; use one or the other")
    if metadata is not None and prior is None and group is None and not adapt.startswith(("group:", "sequence:")):
        raise typer.BadParameter("--metadata has the columns for --prior, --group or --adapt; pass one of these")
    if frames is not None and (boxes is None or split is not None):
        raise typer.BadParameter("--frames needs --boxes, MegaDetector's output for the videos, and goes without --split")
    options = {
        "box_threshold": box_threshold,
        "max_objects": max_objects,
        "batch_size": batch_size,
        "top": top,
        "localizer": localizer,
        "topk_prompts": topk_prompts,
        "precision": precision,
        "cascade": cascade,
        "image_rule": image_rule,
    }

    def rules(predictor: Predictor) -> Rules:
        names = dict(classes=classes, geofence=geofence, region=region, taxonomy=taxonomy, rollup=rollup)
        return rules_for(predictor.checkpoint, abstain=abstain, **names)

    if on_ray(engine, address):
        if format not in (None, "parquet") or store_logits or group or prior or metadata or frames:
            raise typer.BadParameter(
                "--engine ray writes parquet, without --store-logits, --group, --prior, --metadata and --frames"
            )
        _predict_on_ray(
            images, model, out, boxes=boxes, split=split, rules=rules, adapt=adapt, address=address, actors=workers, **options
        )
        return
    if frames is not None and boxes is not None:
        table = read_boxes(boxes)
        inputs = gather(_with_frames(images, table, frames), table)
    else:
        inputs = gather(images, boxes, split)
    if metadata is not None:
        inputs = inputs.with_columns(metadata)
    if localizer is not None:
        inputs = inputs.without_boxes()
    predictor = Predictor.from_pretrained(model, workers=workers, **options)
    predictor = predictor.with_rules(rules(predictor) if prior is None else with_prior(rules(predictor), prior, inputs))
    if predictor.model.finds_object and (inputs.entries or inputs.masks):
        errors.print("this model finds its object itself; boxes and masks are not used")
    meant_for = predictor.checkpoint.localizer.get("spec")
    if meant_for and not inputs.entries and localizer is None:
        hint = f"no boxes are given, so the whole image is classified; this model is meant for boxes from --localizer {meant_for}"
        errors.print(hint)
    bar = lambda items, total: track(items, total, "predicting")  # noqa: E731
    report = predict_to_file(predictor, inputs, out, bar, adapt, format, store_logits, group)
    for image in report.failures[:10]:
        errors.print(f"failed: {image['failure']}")
    if unlocalized := report.localizer_failures:
        why = f"the localizer failed on {len(unlocalized)} of {report.total} images. The first one: {unlocalized[0]}"
        errors.print(why)
    again = f", {report.kept} of them from before" if report.kept else ""
    because = f" ({len(unlocalized)} because the localizer failed)" if unlocalized else ""
    say(
        f"{count(report.total, 'image')}{again}: {count(report.found.total(), 'prediction')}, "
        f"{report.found[True]} with an object found, {report.found[False]} from the whole image{because}; "
        f"{len(report.failures)} failed"
    )
    if rollup is not None or abstain is not None:
        say(f"{report.sources['rollup']} rolled up to a group, {report.sources['abstained']} unknown")
    if cascade is not None:
        say(f"the whole image was not needed for {report.skipped} of {count(report.found[True], 'object')}")
    show_shares(report.shares)
    say(f"wrote {out}")
    if report.failures or (unlocalized and localizer is not None):  # the same command tries these again
        raise typer.Exit(1)


def _with_frames(sources: list[Path], table: BoxTable, folder: Path) -> list[Path]:
    """Extract the frames of the videos among the sources."""
    from l2r2_models.predict.inputs import expanded
    from l2r2_models.predict.videos import extract_frames, is_video_path

    bar = lambda items, total: track(items, total, "extracting frames")  # noqa: E731
    return extract_frames(list(expanded(sources, is_video_path)), table, folder, bar)


def _predict_on_ray(*arguments: Any, **options: Any) -> None:
    """Predict with Ray Data, and print the summary."""
    from l2r2_models.scale import predict as predict_partitions

    bar = lambda items, total: track(items, total, "predicting partitions")  # noqa: E731
    report = predict_partitions(*arguments, progress=bar, **options)
    tally = report.tally
    for why in tally.reasons:
        errors.print(f"failed: {why}")
    say(
        f"{count(tally.images, 'image')} in {count(report.partitions, 'partition')}, {report.kept} of them from before: "
        f"{count(tally.found + tally.whole, 'prediction')}, {tally.found} with an object found, {tally.whole} from the whole "
        f"image; {tally.failed} failed"
    )
    show_shares(report.shares)
    say(f"wrote {arguments[2]}")
    if tally.failed or tally.unlocalized:
        raise typer.Exit(1)

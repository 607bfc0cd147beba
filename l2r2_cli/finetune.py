"""`l2r2 finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import errors, names, say, track

if TYPE_CHECKING:
    from l2r2_models.train.finetune import Result


def finetune(
    data: Annotated[Path, typer.Argument(help="Folder: one folder a class, or an imagefolder with metadata.csv/.jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the same command continues it.")],
    model: Annotated[
        Optional[str], typer.Option(help="A model of `l2r2 list`, with or without a tag, or timm:NAME.", show_default="recipe's")
    ] = None,
    recipe: Annotated[
        Optional[str],
        typer.Option(help="finetune, scratch, head_only, or a YAML file.", show_default="finetune, or scratch without weights"),
    ] = None,
    settings: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe, e.g. ema=0.99; repeatable.", show_default="none"),
    ] = None,
    boxes: Annotated[Optional[Path], typer.Option(help="Box file: MegaDetector, SpeciesNet, COCO, CSV, JSONL, JSON.")] = None,
    metadata: Annotated[Optional[Path], typer.Option(help="Another metadata file for the images of DATA.")] = None,
    train_split: Annotated[Optional[str], typer.Option(help="Rows to train on.", show_default="train, or all")] = None,
    val_split: Annotated[Optional[str], typer.Option(help="Rows for figures.", show_default="val or validation, if any")] = None,
    val_fraction: Annotated[
        Optional[float], typer.Option(help="Hold this part of the training rows out as val.", show_default="0")
    ] = None,
    val_group: Annotated[
        Optional[str], typer.Option(help="Metadata column whose values stay on one side.", show_default="none")
    ] = None,
    val_from: Annotated[
        Optional[str],
        typer.Option(help="random, or end: the last rows of each class, for video frames.", show_default="random"),
    ] = None,
    pretrained: Annotated[
        Optional[bool], typer.Option("--pretrained/--no-pretrained", help="Start from the tag's weights.", show_default="with")
    ] = None,
    init: Annotated[
        Optional[str],
        typer.Option(
            metavar="RUN", help="Start from a run, a Hub id, or a folder with a timm model; without --model also its settings."
        ),
    ] = None,
    branches: Annotated[Optional[str], typer.Option(help="Of full,fg,bg; `full` alone is a plain classifier.")] = None,
    shared: Annotated[
        Optional[bool], typer.Option("--shared/--no-shared", help="One backbone for all branches, or one each.", show_default="")
    ] = None,
    fusion: Annotated[Optional[str], typer.Option(help="One of average, max_confidence, robust.", show_default="robust")] = None,
    threshold: Annotated[
        Optional[float], typer.Option(help="Confidence above which robust trusts fg.", show_default="0.5")
    ] = None,
    fg_mode: Annotated[
        Optional[str], typer.Option(help="crop, masked_crop, masked, late or tokens.", show_default="the model's, mostly crop")
    ] = None,
    margin: Annotated[
        Optional[float], typer.Option(help="Margin around the box, relative to its side.", show_default="0")
    ] = None,
    box_head: Annotated[
        Optional[bool], typer.Option("--box-head", help="Also learn to find the box: the model then needs no detector.")
    ] = None,
    size: Annotated[Optional[int], typer.Option(help="Side of a view in pixels.", show_default="the model's")] = None,
    box_threshold: Annotated[
        Optional[float], typer.Option(help="Boxes with a lower score are not used.", show_default="0.2")
    ] = None,
    epochs: Annotated[Optional[int], typer.Option(show_default="20")] = None,
    batch_size: Annotated[Optional[int], typer.Option(show_default="32")] = None,
    lr: Annotated[Optional[float], typer.Option(show_default="2e-4, or 1e-3 from scratch")] = None,
    weight_decay: Annotated[Optional[float], typer.Option(show_default="0.05")] = None,
    label_smoothing: Annotated[Optional[float], typer.Option(show_default="0.1")] = None,
    box_jitter: Annotated[
        Optional[float], typer.Option(help="How far a box's edges move in training.", show_default="0.1")
    ] = None,
    background_swap: Annotated[
        Optional[float],
        typer.Option(help="How often an object is laid on another image's background in training.", show_default="0"),
    ] = None,
    occlusion: Annotated[
        Optional[float], typer.Option(help="How often a part of the object is hidden in training.", show_default="0")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Of weights, order and augmentation.", show_default="0")] = None,
    workers: Annotated[Optional[int], typer.Option(help="Processes that load images.", show_default="0")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that the folder holds.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write figures for it into the run's logs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model on your images; writes a checkpoint in timm's layout."""
    from l2r2_models.distributed import rank
    from l2r2_models.errors import L2R2Error
    from l2r2_models.train.finetune import finetune as run
    from l2r2_models.train.recipe import Recipe, parse_settings

    flags = dict(
        model=model,
        pretrained=pretrained,
        init=init,
        branches=names(branches),
        shared=shared,
        fusion=fusion,
        threshold=threshold,
        fg_mode=fg_mode,
        margin=margin,
        size=size,
        box_threshold=box_threshold,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        box_jitter=box_jitter,
        seed=seed,
        workers=workers,
        val_fraction=val_fraction,
        val_group=val_group,
        val_from=val_from,
        background_swap=background_swap,
        occlusion=occlusion,
        box_head=box_head,
    )
    changes = {key: value for key, value in flags.items() if value is not None}
    more = parse_settings(settings or [])
    if twice := sorted(set(changes) & set(more)):
        raise L2R2Error(f"{twice[0]} is given twice, by its flag and by --set.")
    changes.update(more)
    base = recipe or ("scratch" if changes.get("pretrained") is False else "finetune")
    result = run(
        data,
        Recipe.read(base, changes),
        out,
        boxes=boxes,
        metadata=metadata,
        train_split=train_split,
        val_split=val_split,
        skip_bad=skip_bad,
        overwrite=overwrite,
        tensorboard=tensorboard,
        progress=lambda steps, total: track(steps, total, "checking images"),
    )
    if rank() == 0:
        _say(result, as_json)


def _say(result: Result, as_json: bool) -> None:
    for reason in result.skipped.values():
        errors.print(f"left out: {reason}")
    for note in result.notes:
        errors.print(note)
    if as_json:
        figures = {"images": result.images, "with_box": result.with_box, "left_out": len(result.skipped)}
        typer.echo(json.dumps({"run": str(result.folder), "metrics": result.metrics, **figures}))
        return
    say(f"{result.with_box} of {result.images} training images have a usable box or mask")
    for name, value in result.metrics.items():
        say(f"{name.replace('_', ' ')} on the validation split: {100 * value:.1f} %")
    say(f"{'already finished: ' if result.was_finished else 'wrote '}{result.folder}")

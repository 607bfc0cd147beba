"""`l2r2 finetune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from l2r2_hub_configs import derived_configs, unknown_model

from .common import Refusal, errors, names, say, track
from .options import Boxes, Data, Json, Metadata, SkipBad, box_threshold

if TYPE_CHECKING:
    from l2r2_models.train.finetune import Result


def _complete_model(incomplete: str) -> list[str]:
    """Complete names of models, and after a dot of their tags."""
    found = {c.name if "." in incomplete else c.architecture for c in derived_configs()}
    return sorted(name for name in found if name.startswith(incomplete))


def _show_keys(show: bool) -> None:
    if not show:
        return
    import yaml

    from l2r2_models.train.recipe_docs import describe_keys

    for key, (default, meaning) in describe_keys().items():
        value = list(default) if isinstance(default, tuple) else default
        say(f"{key}: {yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}  # {meaning}")
    raise typer.Exit


def finetune(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder. Rerun to resume an interrupted run.")],
    model: Annotated[
        Optional[str],
        typer.Option(
            help="Model of `l2r2 list`, with or without a tag; timm:NAME; or vlm:MODEL?names=FILE to start from class names.",
            show_default="the recipe's",
            autocompletion=_complete_model,
        ),
    ] = None,
    recipe: Annotated[
        Optional[str],
        typer.Option(
            help="finetune, few_images, head_only, scratch, or a YAML file.",
            show_default="finetune, or scratch with --no-pretrained",
        ),
    ] = None,
    settings: Annotated[
        Optional[list[str]],
        typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe, e.g. ema=0.99. Repeatable."),
    ] = None,
    keys: Annotated[
        bool,
        typer.Option("--keys", callback=_show_keys, is_eager=True, help="Show every key for --set with its default, and exit."),
    ] = False,
    boxes: Boxes = None,
    box_threshold: Annotated[Optional[float], box_threshold("0.2")] = None,
    metadata: Metadata = None,
    train_split: Annotated[Optional[str], typer.Option(help="Split to train on.", show_default="train, or all")] = None,
    val_split: Annotated[
        Optional[str], typer.Option(help="Split to validate on.", show_default="val or validation, if there is one")
    ] = None,
    val_fraction: Annotated[
        Optional[float], typer.Option(help="Hold out this fraction of the training images for validation.", show_default="0")
    ] = None,
    val_group: Annotated[
        Optional[str], typer.Option(help="Metadata column, e.g. site: images with the same value are held out together.")
    ] = None,
    val_from: Annotated[
        Optional[str],
        typer.Option(help="Images to hold out: random, or the end of each class (for video frames).", show_default="random"),
    ] = None,
    pretrained: Annotated[
        Optional[bool],
        typer.Option("--pretrained/--no-pretrained", help="Start from pretrained weights.", show_default="pretrained"),
    ] = None,
    init: Annotated[
        Optional[str],
        typer.Option(
            metavar="RUN",
            help="Start from a run, a Hub id, or a folder with a timm model; without --model, also use its model and views.",
        ),
    ] = None,
    branches: Annotated[
        Optional[str],
        typer.Option(help="Any of full,fg,bg; `full` alone is a plain classifier.", show_default="full,fg"),
    ] = None,
    shared: Annotated[
        Optional[bool],
        typer.Option("--shared/--no-shared", help="Share one backbone, or train one per branch.", show_default="shared"),
    ] = None,
    fg_mode: Annotated[
        Optional[str],
        typer.Option(
            help="What the fg branch sees: crop, masked_crop, masked, late or tokens.", show_default="the model's, usually crop"
        ),
    ] = None,
    box_head: Annotated[
        Optional[bool], typer.Option("--box-head", help="Also train a head that finds the box, to predict without a detector.")
    ] = None,
    mask_head: Annotated[
        Optional[bool],
        typer.Option("--mask-head", help="Also train a head that finds the mask, to predict without a segmenter. Needs masks."),
    ] = None,
    background_swap: Annotated[
        Optional[float],
        typer.Option(help="Probability of pasting a training object onto another image's background.", show_default="0"),
    ] = None,
    size: Annotated[Optional[int], typer.Option(help="Side of the views in pixels.", show_default="the model's")] = None,
    epochs: Annotated[Optional[int], typer.Option(help="Passes over the training images.", show_default="20")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Images per batch.", show_default="32")] = None,
    lr: Annotated[
        Optional[float], typer.Option(help="Peak learning rate.", show_default="2e-4, or 1e-3 with --no-pretrained")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Random seed.", show_default="0")] = None,
    workers: Annotated[
        Optional[int], typer.Option(help="Workers that load images in advance; 0 for none.", show_default="0")
    ] = None,
    skip_bad: SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log metrics for TensorBoard in the run folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model on your images and save it as a checkpoint in timm's layout.

    The options cover the most common settings; --set changes any other recipe key, and --keys lists them all.
    """
    if model is not None and (sentence := unknown_model(model)):
        raise Refusal(sentence)
    from l2r2_models.distributed import rank
    from l2r2_models.errors import L2R2Error
    from l2r2_models.io import parse_settings
    from l2r2_models.train.finetune import finetune as run
    from l2r2_models.train.recipe import Recipe

    flags = dict(
        model=model,
        pretrained=pretrained,
        init=init,
        branches=names(branches),
        shared=shared,
        fg_mode=fg_mode,
        size=size,
        box_threshold=box_threshold,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        workers=workers,
        val_fraction=val_fraction,
        val_group=val_group,
        val_from=val_from,
        background_swap=background_swap,
        box_head=box_head,
        mask_head=mask_head,
    )
    changes = {key: value for key, value in flags.items() if value is not None}
    more = parse_settings(settings or [])
    if twice := sorted(set(changes) & set(more)):
        raise L2R2Error(f"{twice[0]} is given twice, by its option and by --set; pass it once.")
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
        counts = {"images": result.images, "with_box": result.with_box, "left_out": len(result.skipped)}
        typer.echo(json.dumps({"run": str(result.folder), "metrics": result.metrics, **counts}))
        return
    say(f"{result.with_box} of {result.images} training images have a usable box or mask")
    for name, value in result.metrics.items():
        say(f"{name.replace('_', ' ')} on the validation split: {100 * value:.1f} %")
    say(f"{'already finished: ' if result.was_finished else 'wrote '}{result.folder}")

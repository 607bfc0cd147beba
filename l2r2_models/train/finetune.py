"""`finetune`: a data set and a recipe in, a run's folder with a checkpoint out, on transformers' Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.dataset import Check, ImageTable, check_images, read_table, rows_digest
from ..data.splits import hold_out
from ..errors import L2R2Error
from ..files import write_json
from ..hub import save_checkpoint
from .models import create_model
from .recipes import Recipe
from .run_folder import CHECKPOINTS, RUN, check_place, finished, versions
from .trainer import train as run_training

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "dev")
Progress = Callable[[Iterable[None], int], Iterable[None]]


@dataclass(frozen=True)
class Result:
    """What `finetune` made.

    Attributes:
        folder: the run's folder.
        metrics: accuracies on the validation split, empty without one.
        images, with_box: training images, and how many of them have a usable box.
        skipped: images left out, with the reason.
        was_finished: nothing was done, the run had been finished before.
    """

    folder: Path
    metrics: dict[str, float]
    images: int
    with_box: int
    skipped: dict[Path, str]
    was_finished: bool = False


def finetune(
    data: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    metadata: str | Path | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda steps, _: steps,
) -> Result:
    """Train a model on a user's images and write a checkpoint in timm's layout.

    Interrupted, the same call continues after the last finished epoch; finished, it does nothing. No validation row is used
    for anything but the figures at the end: the weights are those after the last epoch.

    Args:
        data: folder, see `read_table`.
        recipe: see `Recipe`.
        out: the run's folder.
        boxes, metadata: see `read_table`.
        train_split, val_split: names in the metadata or folders; by default `train` (all images if there are no splits) and,
            where there is one, `val` or `validation`.
        skip_bad: leave unreadable images out instead of stopping.
        overwrite: delete the run that `out` holds, once the new one can start.
        progress: wraps the steps while images are checked.

    Raises:
        L2R2Error: unusable data, an unknown model, or a folder that holds another run.
    """
    out = Path(out)
    table = read_table(data, metadata=metadata, boxes=boxes)
    train, val = _split(table, train_split, val_split, recipe)
    classes = train.classes()
    settings = {
        "recipe": recipe.to_dict(),
        "data": {"train": rows_digest(train), "images": len(train), "classes": list(classes)},
    }
    check_place(out, Path(data), settings, overwrite)
    if not overwrite and (done := finished(out)) is not None:
        return Result(out, done["metrics"], len(train), done["data"]["with_box"], {}, was_finished=True)

    model = create_model(recipe, len(classes))  # before the slow check of the images: a wrong name shows at once
    train, val, check = _usable(train, val, recipe, skip_bad, progress)
    if train.classes() != classes:
        raise L2R2Error(f"{table.root}: a class lost all of its images; the classes left are {', '.join(train.classes())}.")
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    write_json(out / RUN, settings)
    metrics = run_training(model, recipe, train, val, classes, out)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise L2R2Error(f"{out}: the training has diverged, its weights are not finite; --overwrite it with a lower --lr.")
    with_box = sum(row.path in check.with_box for row in train.rows)
    settings["data"]["with_box"] = with_box
    save_checkpoint(model, out, classes, settings)
    files = {"train_files": train.names(), "val_files": val.names() if val else []}
    record = {**settings, "versions": versions(), **files, "metrics": metrics}
    write_json(out / RUN, record)  # last: it says that the run is finished
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return Result(out, metrics, len(train), with_box, check.bad)


def _split(
    table: ImageTable, train: str | None, val: str | None, recipe: Recipe
) -> tuple[ImageTable, ImageTable | None]:
    def known(names: tuple[str, ...]) -> str | None:
        return next((split for name in names for split in table.splits if split.lower() == name), None)

    train, val = train or known(TRAIN_NAMES) or ("train" if table.splits else None), val or known(VAL_NAMES)
    train_table = table.of_split(train) if train else table
    if val and val == train:
        raise L2R2Error(f"{table.root}: the split {val} cannot be both trained on and validated on.")
    if val and recipe.val_fraction:
        raise L2R2Error(f"{table.root}: has the validation split {val}; leave the val_fraction out.")
    if not recipe.val_fraction:
        return train_table, table.of_split(val) if val else None
    train_table.classes()  # labels must be there before they are split
    return hold_out(train_table, recipe.val_fraction, group=recipe.val_group, seed=recipe.seed)


def _usable(
    train: ImageTable, val: ImageTable | None, recipe: Recipe, skip_bad: bool, progress: Progress
) -> tuple[ImageTable, ImageTable | None, Check]:
    rows = train.rows + (val.rows if val else ())
    check = check_images(replace(train, rows=rows), progress, recipe.box_threshold)
    if check.bad and not skip_bad:
        count = f"{len(check.bad)} of {len(rows)} images cannot be used"
        raise L2R2Error(f"{count}, e.g. {next(iter(check.bad.values()))} Mend them, or leave them out with --skip-bad.")

    def without(table: ImageTable) -> ImageTable:
        return replace(table, rows=tuple(row for row in table.rows if row.path not in check.bad))

    train = without(train)
    looks_at_objects = [branch for branch in recipe.branches if branch != "full"]
    if looks_at_objects and not any(row.path in check.with_box for row in train.rows):
        raise L2R2Error(
            f"{train.root}: no training image has a box or mask that can be used (inside the image, score at least "
            f"{recipe.box_threshold:g}), so {' and '.join(looks_at_objects)} would learn nothing; "
            "give --boxes FILE, or train a plain classifier with --branches full."
        )
    return train, without(val) if val else None, check

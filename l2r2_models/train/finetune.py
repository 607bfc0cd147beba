"""Fine-tune a model on a data set, and write a run folder with a checkpoint."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import distributed as processes
from ..checkpoints.checkpoint import save_checkpoint
from ..checkpoints.download import local_folder
from ..checkpoints.format import CONFIG
from ..checkpoints.zero_shot import PREFIX, is_zero_shot
from ..data.dataset import Check, Sample, check_images
from ..data.near_duplicates import HELD_OUT, find_leaks
from ..data.shards import index_shards
from ..data.splits import hold_out
from ..data.table import ImageTable, read_table, rows_digest
from ..errors import L2R2Error
from ..io import remove_stale, write_json, write_text
from ..locks import only_writer
from ..models.l2r2 import L2R2
from ..models.masking import kept_patches, patch_grid
from ..runs import CHECKPOINTS, RECIPE, RUN, check_place, finished, record_of, surroundings
from ..views import make_views
from .computation import CHOSEN, check_batch_norm, check_device, resolve
from .groups import count_groups
from .init import InitCheckpoint
from .models import create_model, frozen_parts
from .optimizers import check_optimizer
from .prototypes import PrototypeStart
from .recipe import NO_METRIC, Recipe
from .upweight import FirstStage

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "dev")
Start = InitCheckpoint | PrototypeStart | None
Progress = Callable[[Iterable[None], int], Iterable[None]]


@dataclass(frozen=True)
class Result:
    """The outcome of `finetune`.

    Attributes:
        folder: the run folder.
        metrics: accuracies on the validation split; empty without one.
        images, with_box: number of training images, and of those with an object that fg can see.
        skipped: excluded images, with the reason.
        was_finished: whether the run was already finished, and nothing was done.
        notes: notes on the initialization, on near-duplicates across splits, and on the choice of the epoch.
    """

    folder: Path
    metrics: dict[str, float]
    images: int
    with_box: int
    skipped: dict[Path, str]
    was_finished: bool = False
    notes: tuple[str, ...] = ()


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
    tensorboard: bool = False,
    progress: Progress = lambda steps, _: steps,
) -> Result:
    """Train a model on labeled images and write a checkpoint in timm's layout.

    The same call continues an interrupted run after its last finished epoch, and does nothing for a finished one. Unless the
    recipe has a `best_metric`, the validation rows are only used for the metrics at the end, and the weights are those after the
    last epoch. Under torchrun the processes share each batch; the first process checks the images and writes.

    Args:
        data: folder of images, see `read_table`.
        recipe: see `Recipe`.
        out: the run folder.
        boxes, metadata: see `read_table`.
        train_split, val_split: names of splits; by default `train` (all images if there are no splits), and `val` or
            `validation` if there is one.
        skip_bad: skip unreadable images instead of stopping.
        overwrite: delete the run in `out` once the new one is ready to start.
        tensorboard: write logs for TensorBoard to `out/logs`.
        progress: wraps the iteration while images are checked.

    Returns:
        The run folder, its validation metrics, and notes.

    Raises:
        L2R2Error: when the data or the model is unusable, the training diverges, or `out` contains another run or is being
            written by another process.

    >>> recipe = Recipe.default("l2r2_convnext_tiny", pretrained=True, epochs=10)  # doctest: +SKIP
    >>> result = finetune("data/", recipe, "runs/fungi", boxes="boxes.json")  # doctest: +SKIP
    >>> print(result.folder, result.metrics)  # doctest: +SKIP
    """
    out, began = Path(out), time.monotonic()
    trainer = _trainer_module(tensorboard)
    if metadata is None:
        processes.on_first(lambda: index_shards(data))  # while the other processes wait, which then find the index
    table = processes.together(lambda: read_table(data, metadata=metadata, boxes=boxes))
    train, val, settings = processes.together(lambda: _plan(table, recipe, train_split, val_split))
    start = processes.together(lambda: _start(recipe, out, settings))
    first = processes.together(lambda: _first_stage(recipe, out, train, settings))
    with ExitStack() as held:
        if (done := processes.on_first(lambda: _claim(out, Path(data), settings, overwrite, held))) is not None:
            earlier = tuple(done.get("notes", []))
            return Result(out, done["metrics"], len(train), done["data"]["with_box"], {}, was_finished=True, notes=earlier)

        classes = train.classes()
        # before the slow check of the images, so that a wrong name is reported at once
        model, notes = processes.together(lambda: _model(recipe, classes, start))
        settings["resolved"] = processes.on_first(lambda: _resolved(recipe, model, {} if overwrite else record_of(out)))
        notes += _seen_before(start, val, classes)
        check = processes.on_first(lambda: _check(train, val, recipe, model, skip_bad, progress))
        train, val = _without(train, check.bad), _without(val, check.bad) if val else None
        leaks = processes.on_first(lambda: find_leaks(train, _other_rows(table, train, val), check.hashes, progress))
        processes.on_first(lambda: _begin(out, recipe, settings, overwrite))
        drawn = train
        if first is not None:
            wrong = processes.on_first(lambda: first.errors(train, recipe.batch_size, recipe.workers, progress))
            drawn = first.upweighted(train, wrong)
            missed = f"{recipe.jtt} misclassifies {sum(wrong)} of {len(train)} training images"
            notes.append(f"{missed}; each of them is drawn {first.factor} times per epoch")
        trained = trainer.train(model, replace(recipe, **settings["resolved"]), drawn, val, classes, out, tensorboard=tensorboard)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise L2R2Error(f"{out}: the training has diverged; train again with --overwrite and a lower --lr.")
        with_box = sum(row.path in check.with_box for row in train.rows)
        settings["data"]["with_box"] = with_box
        record = {
            **settings,
            **surroundings(),
            "seconds": round(time.monotonic() - began, 1),
            "epochs": {"trained": trained.epochs, "before_this_call": trained.continued},
            "best": None if trained.best is None else {"metric": recipe.best_metric, **asdict(trained.best)},
            "val_used_for": [k for k in ("best_metric", "patience") if trained.best is not None and getattr(recipe, k)],
            "leaks": [leak.to_dict() for leak in leaks],
            "init_files": start.files(classes) if start else [],
            "notes": [*notes, *(leak.sentence(recipe.val_group, recipe.val_from) for leak in leaks), *_notes(recipe, trained)],
            "train_files": train.names(),
            "val_files": val.names() if val else [],
            "metrics": trained.metrics,
        }
        processes.on_first(lambda: _finish(out, recipe, model, classes, settings, record))
        return Result(out, trained.metrics, len(train), with_box, check.bad, notes=tuple(record["notes"]))


def _trainer_module(tensorboard: bool) -> Any:
    try:
        if tensorboard:
            importlib.import_module("tensorboard")
        return importlib.import_module(".trainer", __package__)
    except ImportError as error:
        raise L2R2Error('Training needs more packages: pip install "l2r2-models[train]".') from error


def _plan(
    table: ImageTable, recipe: Recipe, train_split: str | None, val_split: str | None
) -> tuple[ImageTable, ImageTable | None, dict[str, Any]]:
    """Return the training and validation rows, and the settings that identify the run."""
    if recipe.objective == "group_dro" and processes.world() > 1:
        raise L2R2Error("group_dro weighs the groups of a whole batch, so it needs a single process; start it without torchrun.")
    train, val = _split(table, train_split, val_split, recipe)
    about = {"train": rows_digest(train), "images": len(train), "classes": list(train.classes())}
    if table.boxes_from:
        about["boxes_from"] = table.boxes_from
    if recipe.mask_head and not any(row.has_mask for row in train.rows):
        raise L2R2Error(
            f"{train.root}: mask_head needs masks, and no training image has one; add mask files to the metadata, or pass "
            "--boxes with the masks of `l2r2 localize --localizer ...?masks=sam:MODEL`."
        )
    if recipe.group:
        about["groups"] = count_groups(train, recipe.group)
    if recipe.best_metric != NO_METRIC:
        if val is None:
            raise L2R2Error(
                f"{train.root}: best_metric needs validation rows to choose the best epoch; pass --val-split or "
                "--val-fraction, or set best_metric to none to keep the last epoch."
            )
        about["val"] = rows_digest(val)
    return train, val, {"recipe": recipe.to_dict(), "data": about}


def _claim(out: Path, data: Path, settings: dict[str, Any], overwrite: bool, held: ExitStack) -> dict[str, Any] | None:
    """Return the record of a finished run, or else None with the folder locked until `held` is closed."""
    if (done := _finished(out, data, settings, overwrite)) is None:
        held.enter_context(only_writer(out))
        if out.is_dir():
            for name in (RUN, RECIPE, CONFIG):
                remove_stale(out / name)
        done = _finished(out, data, settings, overwrite)  # another process may have finished it meanwhile
    return done


def _finished(out: Path, data: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    check_place(out, data, settings, overwrite, defaults=Recipe(settings["recipe"]["model"]).to_dict())
    return None if overwrite else finished(out)


def _model(recipe: Recipe, classes: Sequence[str], start: Start) -> tuple[L2R2, list[str]]:
    """Create the model, and a note on its initialization."""
    check_device(recipe)
    check_optimizer(recipe.optimizer)
    model = create_model(recipe, len(classes), start)
    if recipe.sync_batch_norm:
        check_batch_norm(model)
    frozen_parts(model, recipe)  # raises if there is nothing to freeze
    return model, [start.give(model, classes)] if start else []


def _resolved(recipe: Recipe, model: L2R2, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the recipe leaves to the hardware, as an earlier call chose it if the run is continued."""
    resolved = resolve(recipe, model, record.get("resolved", {}))
    return {key: getattr(resolved, key) for key in CHOSEN}


def _start(recipe: Recipe, out: Path, settings: dict[str, Any]) -> Start:
    """Open the checkpoint or the vision-language model to start from, which becomes part of the run's settings."""
    start: Start = None
    if recipe.init is not None:
        start = InitCheckpoint.read(recipe.init)
    elif is_zero_shot(recipe.model):
        start = PrototypeStart.read(recipe.model)
    if start is None:
        return None
    if start.folder.resolve().is_relative_to(out.resolve()):
        raise L2R2Error(f"{out}: contains the checkpoint to start from; choose another -o.")
    settings["init"] = start.about()
    return start


def _first_stage(recipe: Recipe, out: Path, train: ImageTable, settings: dict[str, Any]) -> FirstStage | None:
    """Load the run whose errors are drawn more often, which becomes part of the run's settings."""
    if recipe.jtt is None:
        return None
    if (folder := local_folder(recipe.jtt)) is not None and folder.resolve().is_relative_to(out.resolve()):
        raise L2R2Error(f"{out}: contains the run that jtt names; choose another -o.")
    first = FirstStage.read(recipe.jtt, recipe.jtt_factor, train.classes())
    settings["jtt"] = first.about()
    return first


def _seen_before(start: Start, val: ImageTable | None, classes: Sequence[str]) -> list[str]:
    seen = set(val.names()) & set(start.files(classes)) if start and val else set()
    if not (start and val and seen):
        return []
    return [f"{len(seen)} of {len(val)} validation images were trained on by {start.name}: their metrics are optimistic"]


def _begin(out: Path, recipe: Recipe, settings: dict[str, Any], overwrite: bool) -> None:
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    write_json(out / RUN, settings)
    write_text(out / RECIPE, recipe.to_yaml())


def _localizer(recipe: Recipe, boxes_from: dict[str, Any]) -> dict[str, Any]:
    """Return the localizer that the model is trained for: its own mask head or box head, or the one that made the box file."""
    spec = "mask-head" if recipe.mask_head else "head" if recipe.box_head else boxes_from.get("localizer")
    more = {key: boxes_from[key] for key in ("license", "oracle") if boxes_from.get(key) and spec == boxes_from.get("localizer")}
    return {} if spec is None else {"spec": spec, **more}


def _finish(
    out: Path, recipe: Recipe, model: L2R2, classes: Sequence[str], settings: dict[str, Any], record: dict[str, Any]
) -> None:
    if "init" in settings:  # the config may be published, so no paths of this machine
        name = settings["init"]["name"]
        public = {"model": f"{PREFIX}{name}"} if is_zero_shot(recipe.model) else {"init": name}
        settings = {**settings, "recipe": {**settings["recipe"], **public}}
    if "jtt" in settings:
        settings = {**settings, "recipe": {**settings["recipe"], "jtt": settings["jtt"]["name"]}}
    try:
        localizer = _localizer(recipe, settings["data"].get("boxes_from", {}))
        digest = save_checkpoint(model, out, classes, settings, localizer=localizer)
    except OSError as error:
        raise L2R2Error(f"{out}: cannot be written ({error.strerror or error}); run the same command again to finish.") from error
    write_json(out / RUN, {**record, "weights_sha256": digest})  # written last: it marks the run as finished
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _notes(recipe: Recipe, trained: Any) -> list[str]:
    notes, best = [], trained.best
    if recipe.trainable == "head" and not recipe.pretrained:
        notes.append("the backbone has random weights; only the heads were trained")
    if best is not None:
        name = recipe.best_metric.replace("_", " ")
        notes.append(f"kept epoch {best.epoch} of {best.epochs}: best {name} on the validation rows ({100 * best.value:.1f} %)")
        if best.epochs < recipe.epochs:
            notes.append(f"stopped early: no improvement in {recipe.patience} epochs")
        notes.append("the epoch was chosen on the validation rows, so their metrics are slightly optimistic")
    return notes


def _split(table: ImageTable, train: str | None, val: str | None, recipe: Recipe) -> tuple[ImageTable, ImageTable | None]:
    def known(names: tuple[str, ...]) -> str | None:
        return next((split for name in names for split in table.splits if split.lower() == name), None)

    train = train or known(TRAIN_NAMES) or ("train" if table.splits else None)
    if val is None and (usual := known(VAL_NAMES)) != train:  # the last layer may be trained on the validation rows
        val = usual
    train_table = table.of_split(train) if train else table
    if val and val == train:
        raise L2R2Error(f"{table.root}: the split {val} cannot be used for both training and validation; choose another one.")
    if val and recipe.val_fraction:
        raise L2R2Error(f"{table.root}: already has the validation split {val}; do not set val_fraction.")
    if not recipe.val_fraction:
        return train_table, table.of_split(val) if val else None
    train_table.classes()  # check the labels before splitting
    return hold_out(train_table, recipe.val_fraction, group=recipe.val_group, take=recipe.val_from, seed=recipe.seed)


def _check(train: ImageTable, val: ImageTable | None, recipe: Recipe, model: L2R2, skip_bad: bool, progress: Progress) -> Check:
    """Decode every image once, and check that enough usable images remain."""
    rows = train.rows + (val.rows if val else ())
    check = check_images(replace(train, rows=rows), progress, recipe.box_threshold, lambda sample: _fg_sees_object(model, sample))
    if check.bad and not skip_bad:
        count = f"{len(check.bad)} of {len(rows)} images cannot be used"
        raise L2R2Error(f"{count}, e.g. {next(iter(check.bad.values()))} Fix them, or skip them with --skip-bad.")
    left = {str(row.label) for row in train.rows if row.path not in check.bad}
    if left != set(train.classes()):
        names = ", ".join(sorted(left)) or "none"
        raise L2R2Error(f"{train.root}: a class has no usable images; the remaining classes are {names}.")
    if val and all(row.path in check.bad for row in val.rows):
        raise L2R2Error(f"{val.root}: no validation image can be read.")
    needs_objects = [b for b in recipe.branches if b != "full" and not model.finds_object]
    if needs_objects and not any(row.path in check.with_box for row in train.rows):
        raise L2R2Error(
            f"{train.root}: no training image has a usable box or mask (inside the image, not empty, score at "
            f"least {recipe.box_threshold:g}), so {' and '.join(needs_objects)} cannot be trained; "
            "pass --boxes FILE, or train a plain classifier with --branches full."
        )
    return check


def _fg_sees_object(model: L2R2, sample: Sample) -> bool:
    """Return whether fg sees the object of a sample; a token mask may keep no patch of a small object."""
    spec = model.view_spec
    if "fg" not in model.branches or not (spec.fg.erases or spec.fg.takes_mask):
        return sample.has_box
    views = make_views([sample.pixels], sample.box[None], spec, branches=("fg",), masks=[sample.mask])
    if not spec.fg.drops_tokens:
        return bool(views.has_fg)
    assert views.mask is not None
    grid = patch_grid(model.backbone_of("fg"), spec.size_of("fg"), spec.size_of("fg"))
    return bool(views.has_fg & kept_patches(views.mask, grid, spec.coverage).any(1))


def _other_rows(table: ImageTable, train: ImageTable, val: ImageTable | None) -> dict[str, ImageTable]:
    """Return the rows that are not trained on, by split."""
    ours = {train.rows[0].split}
    others = {} if val is None else {HELD_OUT if val.rows[0].split in ours else str(val.rows[0].split): val}
    return {**{name: table.of_split(name) for name in table.splits if name not in ours}, **others}


def _without(table: ImageTable, bad: Mapping[Path, str]) -> ImageTable:
    return replace(table, rows=tuple(row for row in table.rows if row.path not in bad))

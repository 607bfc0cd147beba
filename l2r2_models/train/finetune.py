"""`finetune`: a data set and a recipe in, a run's folder with a checkpoint out, on transformers' Trainer."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data.dataset import Check, ImageTable, ViewDataset, check_images, read_table, rows_digest
from ..data.splits import hold_out
from ..errors import L2R2Error
from ..files import read_json, write_json
from ..hub import CONFIG, WEIGHTS, save_checkpoint
from ..model import BRANCHES, L2R2
from ..views import ViewSpec
from .recipes import Recipe

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "dev")
RUN, CHECKPOINTS = "run.json", "checkpoints"
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


class BranchLoss(nn.Module):
    """A model with its training loss: the sum of the branches' cross-entropies (METHOD.md 3).

    Rows without a box count for the full branch only; their fg view is the whole image.
    """

    def __init__(self, model: L2R2, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(
        self,
        labels: Tensor,
        has_fg: Tensor,
        full: Tensor | None = None,
        fg: Tensor | None = None,
        bg: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Views `[B, C, S, S]`, labels `[B]` -> loss, and the logits `[B, classes]` by branch and fused.

        For figures, rows without a box have the full branch's logits in every branch, as a Prediction has.
        """
        logits = self.model.forward_branches(full=full, fg=fg, bg=bg)
        rows = {branch: torch.ones_like(has_fg) if branch == "full" else has_fg for branch in logits}
        losses = [self._loss(z, labels, rows[branch]) for branch, z in logits.items()]
        fused = self.model.fuse(logits, has_fg)
        if "full" in logits:
            logits = {branch: torch.where(rows[branch][:, None], z, logits["full"]) for branch, z in logits.items()}
        return {"loss": torch.stack(losses).sum(), "fused": fused, **logits}

    def _loss(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (each * rows).sum() / rows.sum().clamp(min=1)


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
    _check_place(out, Path(data), settings, overwrite)
    if not overwrite and (done := _finished(out)) is not None:
        return Result(out, done["metrics"], len(train), done["data"]["with_box"], {}, was_finished=True)

    model = create_model(recipe, len(classes))  # before the slow check of the images: a wrong name shows at once
    train, val, check = _usable(train, val, recipe, skip_bad, progress)
    if train.classes() != classes:
        raise L2R2Error(f"{table.root}: a class lost all of its images; the classes left are {', '.join(train.classes())}.")
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    write_json(out / RUN, settings)
    metrics = _train(model, recipe, train, val, classes, out)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise L2R2Error(f"{out}: the training has diverged, its weights are not finite; --overwrite it with a lower --lr.")
    with_box = sum(row.path in check.with_box for row in train.rows)
    settings["data"]["with_box"] = with_box
    save_checkpoint(model, out, classes, settings)
    files = {"train_files": train.names(), "val_files": val.names() if val else []}
    record = {**settings, "versions": _versions(), **files, "metrics": metrics}
    write_json(out / RUN, record)  # last: it says that the run is finished
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return Result(out, metrics, len(train), with_box, check.bad)


def create_model(recipe: Recipe, num_classes: int) -> L2R2:
    """The recipe's model with its views.

    Raises:
        L2R2Error: unknown name, weights that cannot be had, or a size that the backbone does not take.
    """
    name, backbone = recipe.model, {}
    if name.startswith("timm:"):
        name, backbone = "l2r2", {"backbone": name.removeprefix("timm:")}
    architecture = name.split(".")[0]
    if not timm.is_model(architecture) or not (architecture == "l2r2" or architecture.startswith("l2r2_")):
        raise L2R2Error(f'Unknown model "{recipe.model}"; `l2r2 list` shows the models, and timm:NAME takes any timm backbone.')
    try:
        cfg = timm.models.get_pretrained_cfg(backbone.get("backbone", name))
    except RuntimeError as error:
        raise L2R2Error(f"{error} `l2r2 list --pretrained` shows the tags.") from None
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = dict(
        num_classes=num_classes, branches=list(recipe.branches), shared=recipe.shared, fusion=recipe.fusion_config(), **backbone
    )
    if recipe.size and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = recipe.size
    try:
        model = cast(L2R2, timm.create_model(name, pretrained=recipe.pretrained, **options))
    except L2R2Error:
        raise
    except (OSError, RuntimeError, AssertionError, ValueError) as error:  # hub, torch and timm errors
        what = " ".join(str(error).split())[:200]
        hint = "; weights that cannot be downloaded are left out with --no-pretrained" if recipe.pretrained else ""
        raise L2R2Error(f"{recipe.model} cannot be created ({what}){hint}.") from error
    changes = {"fg": recipe.fg, "margin": recipe.margin, **({"size": recipe.size} if recipe.size else {})}
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, **changes)
    _try_out(model, recipe)
    return model


def _try_out(model: L2R2, recipe: Recipe) -> None:
    """One pass in evaluation, so that a size that the backbone does not take shows before the images are read."""
    model.eval()
    try:
        with torch.inference_mode():
            view = torch.zeros(2, model.in_chans, model.view_spec.size, model.view_spec.size)
            model.forward_branches(**dict.fromkeys(model.branches, view))
    except (RuntimeError, AssertionError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise L2R2Error(f"{recipe.model} does not take views of {model.view_spec.size} pixels ({what}).") from error
    finally:
        model.train()


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


def _check_place(out: Path, data: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """`out` must be new, empty, or this very run; to be overwritten it must at least be a run."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RUN).is_file() or data.resolve().is_relative_to(out.resolve()):
        raise L2R2Error(f"{out}: exists and is not a run of finetune; choose another -o.")
    if overwrite:
        return
    old = read_json(out / RUN)
    recipe, old_data = (old.get(k) if isinstance(old, dict) else None for k in ("recipe", "data"))
    if not isinstance(recipe, dict) or not isinstance(old_data, dict):
        raise L2R2Error(f"{out / RUN}: is damaged; --overwrite the run.")
    changed = [k for k, v in settings["recipe"].items() if recipe.get(k) != v and k != "workers"]
    changed += ["data set"] if any(old_data.get(k) != v for k, v in settings["data"].items()) else []
    if changed:
        raise L2R2Error(f"{out}: holds a run with another {', '.join(changed)}; choose another -o, or --overwrite it.")


def _finished(out: Path) -> dict[str, Any] | None:
    """The record of a finished run: it is written after everything else."""
    if not all((out / name).is_file() for name in (RUN, CONFIG, WEIGHTS)):
        return None
    record = read_json(out / RUN)
    whole = isinstance(record.get("metrics"), dict) and isinstance(record["data"].get("with_box"), int)
    return record if whole else None


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


def _train(
    model: L2R2, recipe: Recipe, train: ImageTable, val: ImageTable | None, classes: tuple[str, ...], out: Path
) -> dict[str, float]:
    try:
        from transformers import Trainer, TrainingArguments
    except ImportError as error:
        raise L2R2Error('Training needs more packages: pip install "l2r2-models[train]".') from error
    common: dict[str, Any] = dict(spec=model.view_spec, branches=model.branches, box_threshold=recipe.box_threshold)
    steps = -(-len(train) // recipe.batch_size) * recipe.epochs
    trainer = Trainer(
        model=BranchLoss(model, recipe.label_smoothing),
        args=TrainingArguments(
            output_dir=str(out / CHECKPOINTS),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            learning_rate=recipe.lr,
            weight_decay=recipe.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=round(recipe.warmup * steps),
            save_strategy="epoch",
            save_total_limit=1,
            logging_strategy="epoch",
            eval_strategy="epoch" if val else "no",
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            seed=recipe.seed,
            data_seed=recipe.seed,
            dataloader_num_workers=recipe.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            # batch norm cannot take a last batch of one row
            dataloader_drop_last=len(train) > recipe.batch_size > 1 and len(train) % recipe.batch_size == 1,
        ),
        train_dataset=ViewDataset(train, classes, augment=recipe.augment(), seed=recipe.seed, **common),
        eval_dataset=ViewDataset(val, classes, **common) if val else None,
        compute_metrics=functools.partial(accuracies, ("fused", *(b for b in BRANCHES if b in model.branches))),
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its losses; stdout is for the result
            trainer.train(resume_from_checkpoint=_last_checkpoint(out / CHECKPOINTS))
            measured = trainer.evaluate() if val else {}
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        what = " ".join(str(error).split())[:300]
        raise L2R2Error(f"{out}: training stopped ({what}); what was finished before is kept.") from error
    return {k.removeprefix("eval_"): v for k, v in measured.items() if k.endswith("accuracy")}


def accuracies(names: Sequence[str], prediction: Any) -> dict[str, float]:
    """Accuracy by the name of each output of `BranchLoss`, for the Trainer."""
    named = zip(names, prediction.predictions)
    return {f"{name}_accuracy": float((z.argmax(-1) == prediction.label_ids).mean()) for name, z in named}


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; those that a killed process left half-written are removed."""
    numbered = {int(p.name.split("-")[1]): p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # written last
            with safe_open(checkpoint / WEIGHTS, "pt"):
                return str(checkpoint)
        except (OSError, ValueError, SafetensorError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("l2r2-models", "torch", "torchvision", "timm", "transformers")}



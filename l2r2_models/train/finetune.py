"""`finetune`: a data set and a recipe in, a run's folder with a checkpoint out, on transformers' Trainer."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from ..data.dataset import ImageTable, Row, ViewDataset, check_images, read_table
from ..errors import L2R2Error
from ..files import read_json, write_json
from ..hub import WEIGHTS, save_checkpoint
from ..model import BRANCHES, L2R2
from ..views import ViewSpec
from .recipes import Recipe

VAL_NAMES = ("val", "validation", "valid", "dev")
RUN, CHECKPOINTS = "run.json", "checkpoints"


@dataclass(frozen=True)
class Result:
    """What `finetune` made: the run's folder, the branches' accuracies on the validation split (empty without one), the images
    left out with the reason, and whether the run had been finished before."""

    folder: Path
    metrics: dict[str, float]
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
        """Views `[B, C, S, S]`, labels `[B]` -> loss, and the logits `[B, classes]` by branch and fused."""
        logits = self.model.forward_branches(full=full, fg=fg, bg=bg)
        rows = {branch: torch.ones_like(has_fg) if branch == "full" else has_fg for branch in logits}
        losses = [self._loss(z, labels, rows[branch]) for branch, z in logits.items()]
        return {"loss": torch.stack(losses).sum(), "fused": self.model.fuse(logits, has_fg), **logits}

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
    progress: Callable[[Iterable[Row], int], Iterable[Row]] = lambda rows, _: rows,
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
        overwrite: delete what `out` holds.
        progress: wraps the rows while images are checked.

    Raises:
        L2R2Error: unusable data, an unknown model, or a folder that holds another run.
    """
    out = Path(out)
    table = read_table(data, metadata=metadata, boxes=boxes)
    train, val = _split(table, train_split, val_split)
    classes = train.classes()
    settings = {
        "recipe": recipe.to_dict(),
        "data": {"train": train_digest(train), "images": len(train), "classes": list(classes), "boxes": _box_count(train)},
    }
    if _continues(out, settings, overwrite) and (out / WEIGHTS).exists():
        return Result(out, read_json(out / RUN).get("metrics", {}), {}, was_finished=True)

    model = create_model(recipe, len(classes))  # before the slow check of the images: a wrong name shows at once
    train, val, skipped = _usable(train, val, skip_bad, progress)
    if skipped and train.classes() != classes:
        raise L2R2Error(f"{table.root}: a class lost all of its images; the classes left are {', '.join(train.classes())}.")
    if "fg" in recipe.branches and not any(row.entry is not None and row.entry.boxes for row in train.rows):
        raise L2R2Error(
            f"{table.root}: no training image has a box, so the fg branch has nothing to look at; "
            "give --boxes FILE, or train a plain classifier with --branches full."
        )
    write_json(out / RUN, settings)
    metrics = _train(model, recipe, train, val, classes, out)
    save_checkpoint(model, out, classes, settings)
    write_json(out / RUN, {**settings, "versions": _versions(), "metrics": metrics})
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return Result(out, metrics, skipped)


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
    return model


def train_digest(table: ImageTable) -> str:
    """SHA-256 over the rows' names, labels, boxes and image contents' sizes: another data set gives another digest."""
    digest = hashlib.sha256()
    for row in table.rows:
        name = row.path.relative_to(table.root).as_posix()
        digest.update(json.dumps([name, row.label, row.path.stat().st_size, row.entry and row.entry.boxes]).encode())
    return digest.hexdigest()


def _split(table: ImageTable, train: str | None, val: str | None) -> tuple[ImageTable, ImageTable | None]:
    val = val or next((name for name in VAL_NAMES if name in table.splits), None)
    if train is None and not table.splits:
        train_table = table
    else:
        train_table = table.of_split(train or "train")
    return train_table, table.of_split(val) if val else None


def _continues(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` holds this very run; anything else there is refused."""
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RUN).exists():
        raise L2R2Error(f"{out}: exists and is not a run of finetune; choose another -o, or --overwrite it.")
    old = read_json(out / RUN)
    changed = [k for k, v in settings["recipe"].items() if old.get("recipe", {}).get(k) != v and k != "workers"]
    changed += ["the data"] if old.get("data") != settings["data"] else []
    if changed:
        raise L2R2Error(f"{out}: holds a run with another {', '.join(changed)}; choose another -o, or --overwrite it.")
    return True


def _usable(
    train: ImageTable, val: ImageTable | None, skip_bad: bool, progress: Callable[[Iterable[Row], int], Iterable[Row]]
) -> tuple[ImageTable, ImageTable | None, dict[Path, str]]:
    rows = train.rows + (val.rows if val else ())
    bad = check_images(replace(train, rows=rows), progress)
    if bad and not skip_bad:
        first = next(iter(bad.values()))
        count = f"{len(bad)} of {len(rows)} images cannot be used"
        raise L2R2Error(f"{count}, e.g. {first} Mend them, or leave them out with --skip-bad.")

    def without(table: ImageTable) -> ImageTable:
        return replace(table, rows=tuple(row for row in table.rows if row.path not in bad))

    return without(train), without(val) if val else None, bad


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
        ),
        train_dataset=ViewDataset(train, classes, augment=recipe.augment(), seed=recipe.seed, **common),
        eval_dataset=ViewDataset(val, classes, **common) if val else None,
        compute_metrics=functools.partial(accuracies, ("fused", *(b for b in BRANCHES if b in model.branches))),
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(out / CHECKPOINTS))
    if not val:
        return {}
    return {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items() if k.endswith("accuracy")}


def accuracies(names: Sequence[str], prediction: Any) -> dict[str, float]:
    """Accuracy by the name of each output of `BranchLoss`, for the Trainer."""
    named = zip(names, prediction.predictions)
    return {f"{name}_accuracy": float((z.argmax(-1) == prediction.label_ids).mean()) for name, z in named}


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; one that a killed process left half-written is removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # written last
            return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _box_count(table: ImageTable) -> int:
    return sum(bool(row.entry and row.entry.boxes) for row in table.rows)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("l2r2-models", "torch", "torchvision", "timm", "transformers")}



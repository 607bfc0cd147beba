"""The training loop: transformers' Trainer with this project's data, loss and figures."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..data.dataset import ImageTable, ViewDataset
from ..errors import L2R2Error
from ..model import BRANCHES, L2R2
from .losses import BranchLoss
from .recipes import Recipe
from .run_folder import CHECKPOINTS, last_checkpoint


def train(
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
            trainer.train(resume_from_checkpoint=last_checkpoint(out / CHECKPOINTS))
            measured = trainer.evaluate() if val else {}
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        what = " ".join(str(error).split())[:300]
        raise L2R2Error(f"{out}: training stopped ({what}); what was finished before is kept.") from error
    return {k.removeprefix("eval_"): v for k, v in measured.items() if k.endswith("accuracy")}


def accuracies(names: Sequence[str], prediction: Any) -> dict[str, float]:
    """Accuracy by the name of each output of `BranchLoss`, for the Trainer."""
    named = zip(names, prediction.predictions)
    return {f"{name}_accuracy": float((z.argmax(-1) == prediction.label_ids).mean()) for name, z in named}

"""The training loop: transformers' Trainer with this project's data, loss, optimizer and checkpoint selection."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from .. import distributed as processes
from ..data.dataset import ViewDataset
from ..data.loader import ViewLoader, collate
from ..data.table import ImageTable
from ..errors import L2R2Error
from ..io import write_atomic
from ..models.l2r2 import L2R2
from ..models.packed_graphs import PackedGraphs
from ..runs import CHECKPOINTS, LOGS, last_checkpoint
from ..views import BRANCHES
from .batches import EpochBatches
from .best import Best, best_of
from .computation import compile_backbones, synchronize_batch_norm
from .ema import WeightEMA, tensors_of
from .groups import GROUP_STEP, GroupDRO, groups_of
from .losses import BranchLoss, by_branch
from .mixup import ViewMixup
from .models import branches_with_background, frozen_parts
from .optimizers import create_optimizer
from .progress import EpochLines
from .recipe import NO_METRIC, Recipe

AVERAGE, BEST = "average.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Trained:
    """The outcome of a training.

    Attributes:
        metrics: accuracies on the validation rows; empty without any.
        best: the chosen epoch; None if no epoch was chosen.
        epochs: number of epochs trained.
        continued: number of those that were trained before this call.
    """

    metrics: dict[str, float]
    best: Best | None
    epochs: int
    continued: int


class BranchTrainer(Trainer):
    """A transformers Trainer for `BranchLoss`.

    Each optimizer step uses the gradient of the mean over the whole batch, however it is split over accumulation steps and
    processes. Evaluation and the best checkpoint use the averaged weights if the recipe has an EMA.
    """

    model: BranchLoss
    train_dataset: ViewDataset

    def __init__(
        self, model: BranchLoss, recipe: Recipe, batches: EpochBatches, graphs: PackedGraphs | None = None, **arguments: Any
    ) -> None:
        super().__init__(model, callbacks=[_EachStep(self)], **arguments)
        self.recipe, self.batches, self.graphs = recipe, batches, graphs
        self.average = WeightEMA(model, recipe.ema) if recipe.ema else None
        if self.accelerator.num_processes != processes.world():  # otherwise each process would train on its own
            seen = self.accelerator.num_processes
            raise L2R2Error(f"{processes.world()} processes were started, but the Trainer uses {seen}; start them with torchrun.")
        self.model_accepts_loss_kwargs = True  # the loss is divided by the counts of get_batch_samples

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Make the loader that follows `EpochBatches`."""
        return ViewLoader(
            self.train_dataset,
            device=self.args.device,
            batch_sampler=self.batches,
            num_workers=self.recipe.workers,
            pin_memory=torch.cuda.is_available(),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the recipe's optimizer once."""
        if self.optimizer is None:
            self.optimizer = create_optimizer(self.model.model, self.recipe)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the parts of a batch, and its counts.

        Counts are `[2]`: the rows and the rows with an object in the whole batch, by which each process divides its sums, see
        `BranchLoss`.
        """
        parts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [sum(len(part["has_fg"]) for part in parts), sum(int(part["has_fg"].sum()) for part in parts)]
        counts = torch.tensor(rows, dtype=torch.float32, device=device)
        if processes.world() > 1:
            torch.distributed.all_reduce(counts)
        return parts, counts.clamp(min=1) / processes.world()  # gradients are averaged over the processes

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of one part of a batch: of all branches at once, or of one after the other."""
        step = super().training_step
        if self.recipe.branch_backward == "joint":
            return step(model, inputs, num_items_in_batch)
        *others, last = by_branch(self._prepare_inputs(inputs), self.model.model.branches)
        with self.accelerator.no_sync(model):  # processes exchange the sum of the gradients, in the last backward pass
            losses = [step(model, part, num_items_in_batch) for part in others]
        return torch.stack([*losses, step(model, last, num_items_in_batch)]).sum()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Compute the loss, normalized by the counts in training."""
        with self.graphs.replayed() if self.graphs else contextlib.nullcontext():
            outputs = model(**inputs, counts=num_items_in_batch if model.training else None)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the averaged weights if there are any, and keep the weights if this epoch is the best."""
        if processes.world() > 1:
            for buffer in self.model.buffers():  # batch-norm statistics differ between processes
                torch.distributed.broadcast(buffer, 0)
        with self.average.in_place() if self.average else contextlib.nullcontext():
            metrics = super().evaluate(*args, **kwargs)
            if self.is_in_train and self.recipe.best_metric != NO_METRIC:
                self._keep_if_best()
        return metrics

    def best(self) -> Best | None:
        """Return the best epoch so far; None if the recipe does not choose one."""
        return None if self.recipe.best_metric == NO_METRIC else best_of(self.state.log_history, self.recipe.best_metric)

    def _keep_if_best(self) -> None:
        best = self.best()
        if best is not None and best.is_last and self.is_world_process_zero():
            state = tensors_of(self.model)
            write_atomic(Path(str(self.args.output_dir)) / BEST, lambda path: save_file(state, path))
        if best is not None and best.exhausted(self.recipe.patience):
            self.control.should_training_stop = True

    def use_chosen_weights(self) -> None:
        """Load the weights of the best epoch if one was chosen, else the averaged weights if there are any."""
        if self.best() is not None:
            self.accelerator.wait_for_everyone()
            self.model.load_state_dict(load_file(Path(str(self.args.output_dir)) / BEST))
        elif self.average is not None:
            self.average.exchange()
        self.average = None
        self.model.to(memory_format=torch.contiguous_format)  # safetensors saves contiguous tensors only

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, tensors_of(self.model))  # shared and channels_last weights cannot be saved as they are
        if self.average is not None and self.args.should_save:
            self.average.save(Path(str(output_dir)) / AVERAGE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint) / AVERAGE)


class _EachStep(TrainerCallback):
    """Pass the epoch to the batches and the augmentation, and each step to the moving average."""

    def __init__(self, trainer: BranchTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = round(state.epoch or 0)
        self.trainer.batches.set_epoch(epoch)
        self.trainer.train_dataset.set_epoch(epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(state.global_step)


def train(
    model: L2R2,
    recipe: Recipe,
    train: ImageTable,
    val: ImageTable | None,
    classes: tuple[str, ...],
    out: Path,
    *,
    tensorboard: bool = False,
) -> Trained:
    """Train the model in place, or continue where an earlier call was interrupted.

    Args:
        model: the model to train.
        recipe: see `Recipe`; without `auto`, see `resolve`.
        train, val: rows; without `val` nothing is evaluated.
        classes: class names, in the order of the logits.
        out: folder of the run.
        tensorboard: write logs for TensorBoard to `out/logs`.

    Returns:
        Metrics and epochs; the model has the chosen weights.

    Raises:
        L2R2Error: when the training fails.
    """
    trainer = _trainer(model, recipe, train, val, classes, out)
    trainer.remove_callback(PrinterCallback)  # prints dicts
    trainer.add_callback(EpochLines(trainer.batches.rows, trainer.batches.steps))
    if tensorboard:
        callback = TensorBoardCallback()
        callback.logging_dir = str(out / LOGS)
        trainer.add_callback(callback)
    checkpoint = processes.on_first(lambda: last_checkpoint(out / CHECKPOINTS))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints losses; stdout is for the result
            return _run(trainer, checkpoint)
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        what = " ".join(str(error).split())[:300]
        raise L2R2Error(f"{out}: training stopped ({what}); run the same command to continue after its last epoch.") from error


def _run(trainer: BranchTrainer, checkpoint: str | None) -> Trained:
    steps, continued = trainer.batches.steps, 0
    if checkpoint is not None:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        trainer.state.log_history, trainer.state.global_step = state["log_history"], state["global_step"]
        continued = state["global_step"] // steps
    best = trainer.best()
    if best is None or not best.exhausted(trainer.recipe.patience):  # exhausted: the run was killed after its last epoch
        trainer.train(resume_from_checkpoint=checkpoint)
    best, epochs = trainer.best(), trainer.state.global_step // steps
    trainer.use_chosen_weights()
    items, workers = trainer.train_dataset.without_augmentation(), trainer.recipe.workers
    rows = DataLoader(items, trainer.recipe.batch_size, num_workers=workers, collate_fn=collate)
    loaded = ({k: v.to(trainer.args.device) for k, v in item.items()} for item in rows)
    processes.on_first(lambda: trainer.model.model.after_training(loaded))  # the others would read all images too
    values = trainer.evaluate() if trainer.eval_dataset is not None else {}
    metrics = {k.removeprefix("eval_"): v for k, v in values.items() if k.endswith("accuracy")}
    return Trained(metrics, best, epochs, continued)


def _trainer(
    model: L2R2, recipe: Recipe, train: ImageTable, val: ImageTable | None, classes: tuple[str, ...], out: Path
) -> BranchTrainer:
    common: dict[str, Any] = dict(
        spec=model.view_spec,
        branches=model.branches,
        box_threshold=recipe.box_threshold,
        locate=recipe.box_head,
        segment=recipe.mask_head,
    )
    rows = ViewDataset(
        train,
        classes,
        augment=recipe.augment(),
        background_swap=recipe.background_swap,
        swapped_views=branches_with_background(model) if recipe.consistency else (),
        cut=recipe.cut != "device",
        seed=recipe.seed,
        **common,
    )
    groups = rows.groups = groups_of(train, recipe.group) if recipe.group else None
    batches = EpochBatches(
        groups or rows.targets,
        recipe.batch_size,
        seed=recipe.seed,
        balanced=recipe.balanced,
        parts=recipe.grad_accumulation,
        rank=processes.rank(),
        world=processes.world(),
    )
    if min(batches.rows, recipe.batch_size) < batches.world:
        raise L2R2Error(
            f"{batches.world} processes are too many for batches of {min(batches.rows, recipe.batch_size)} images; start fewer."
        )
    if recipe.sync_batch_norm and batches.world > 1:
        synchronize_batch_norm(model)
    if recipe.compile:
        compile_backbones(model)
    mix = ViewMixup(len(classes), recipe.mixup, recipe.cutmix, recipe.mix_probability) if recipe.mixup or recipe.cutmix else None
    loss = BranchLoss(
        model,
        recipe.label_smoothing,
        mix=mix,
        frozen=frozen_parts(model, recipe),
        channels_last=recipe.channels_last is True,
        part_weights=recipe.part_weights(),
        dro=GroupDRO(model.branches, max(groups) + 1, recipe.group_step or GROUP_STEP)
        if groups and recipe.objective == "group_dro"
        else None,
        consistency=recipe.consistency,
    )
    each = -(-min(batches.rows, recipe.batch_size) // (batches.parts * batches.world))
    return BranchTrainer(
        loss,
        recipe,
        batches,
        PackedGraphs(model.backbone_of("fg"), each, training=True) if recipe.cuda_graphs else None,
        args=_arguments(recipe, batches, out, validate=val is not None),
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=ViewDataset(val, classes, **common) if val else None,
        compute_metrics=functools.partial(accuracies, ("fused", *(b for b in BRANCHES if b in model.branches))),
    )


def _arguments(recipe: Recipe, batches: EpochBatches, out: Path, *, validate: bool) -> TrainingArguments:
    each = max(1, recipe.batch_size // batches.world)
    arguments = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=max(1, each // batches.parts),
        per_device_eval_batch_size=each,
        gradient_accumulation_steps=batches.parts,
        max_grad_norm=recipe.clip_grad,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * batches.steps * recipe.epochs),
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        eval_strategy="epoch" if validate else "no",
        report_to="none",
        disable_tqdm=True,  # see `EpochLines`
        remove_unused_columns=False,
        label_names=["labels"],
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        # explicit, or the Trainer rejects bf16 and does not see the other processes
        use_cpu=not torch.cuda.is_available() and (recipe.precision == "bf16" or batches.world > 1),
        average_tokens_across_devices=False,
        # the last backward pass of one branch after the other does not use the other heads
        ddp_find_unused_parameters=recipe.branch_backward == "separate" or not recipe.grad_checkpointing,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs need torchrun; never nn.DataParallel
    return arguments


def accuracies(names: Sequence[str], prediction: Any) -> dict[str, float]:
    """Compute accuracy and macro accuracy for each output of `BranchLoss`.

    Args:
        names: names of the outputs, in order.
        prediction: transformers' `EvalPrediction`.

    Returns:
        Fractions in [0, 1], as `NAME_accuracy` and `NAME_macro_accuracy`.
    """
    from sklearn.metrics import recall_score

    labels, found = prediction.label_ids, {}
    for name, z in zip(names, prediction.predictions):
        predicted = z.argmax(-1)
        found[f"{name}_accuracy"] = float((predicted == labels).mean())
        found[f"{name}_macro_accuracy"] = float(recall_score(labels, predicted, labels=np.unique(labels), average="macro"))
    return found

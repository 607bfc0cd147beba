"""Training recipes: one flat, serializable dataclass, saved with the run. A run can only be continued with the same recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from .. import config
from ..boxes.detections import BOX_THRESHOLD
from ..data.augment import Augment
from ..data.splits import VAL_FROM
from ..errors import L2R2Error
from ..fusion import FUSIONS
from ..models.parts import PartWeights
from ..views import BRANCHES, ViewSpec
from .recipe_keys import read_keys

TRAINABLE = ("all", "head")
AUTO: Final = "auto"
CUTS = ("workers", "device")
PRECISIONS = (AUTO, "fp32", "bf16", "fp16")
STRIDES = (0, 2, 4, 8, 16, 32)
BACKWARDS = ("joint", "separate")
OBJECTIVES = ("erm", "group_dro")
NO_METRIC = "none"
METRICS = (NO_METRIC, *(f"{name}_{kind}accuracy" for kind in ("", "macro_") for name in ("fused", *BRANCHES)))


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run.

    Attributes:
        model: registered architecture, with or without a tag; any timm backbone as `timm:NAME`; or `vlm:MODEL?names=FILE` to
            start from the image tower of a vision-language model and the prototypes of its class names.
        pretrained: start from pretrained weights instead of random ones: those of `init`, or of the tag (downloaded by timm).
        init: start from a checkpoint: a run folder, a Hub repository, or a timm classifier saved in timm's layout. Its backbone
            must be the model's; its heads are used if the classes are the same. Keep it in place until the run is finished.
        backbone: other arguments of the timm backbone, e.g. `{patch_size: 8, depth: 6}` for a small ViT from scratch.
        branches: any of full, fg and bg; `full` alone is a plain classifier.
        shared: one backbone for all branches; false gives each branch its own.
        fusion: how the branches' outputs are combined: average, max_confidence or robust.
        fusion_inputs: the branches that are fused; null fuses all.
        threshold: confidence above which the `robust` fusion trusts fg.
        drop: dropout rate before the heads.
        drop_path: rate of stochastic depth in the backbone (arXiv 1603.09382), if timm supports it.
        box_head: also train a head that predicts the object's box, on the boxes of the rows. Rows where no box was found are
            negatives; rows without a result (the localizer failed, or the box file does not list the image) are ignored.
        mask_head: also train a head that predicts the object's mask, on the rows with a mask; rows where no object was found are
            negatives, and rows with a box but no mask are ignored.
        prototype_dim: dimension of an embedding that the heads compare with one prototype per class by cosine similarity; 0
            trains linear heads. A `vlm:` model sets its own.
        grad_checkpointing: recompute activations in the backward pass instead of storing them, to save memory.
        fg_mode: what the fg branch sees: crop, masked_crop, masked, late or tokens; null keeps the model's default.
        bg: what is removed from the bg view: `shape` (the object's pixels) or `box` (its box); null keeps the model's default.
        square: pad views to a square before the resize; false stretches them; null keeps the model's default.
        patch: patch size of a NaFlexViT whose views keep their aspect ratio (see `ViewSpec`); null keeps the model's default.
        fill: RGB levels (0-255) of padding and of replaced pixels; null keeps the model's default.
        interpolation: how views are resized: bilinear or bicubic; null keeps the model's default.
        mode: how views are rounded: `float` (not at all), or `pil` as Pillow does; null keeps the model's default.
        decode: how image files are decoded: `full`, or `scaled` to reduce large ones; null keeps the model's default.
        margin: margin added to the fg box at each end, relative to its side.
        late_stage: fg_mode `late` masks the output of the `last` stage, or of the one `before_last`.
        late_pool: fg_mode `late` pools by the masked mean (`mask`), over all positions (`all`), or by the class token (`token`).
        coverage: fg_mode `tokens` keeps the patches of which the object covers at least this fraction.
        size: side of the views in pixels; null keeps the model's input size.
        sizes: other sides of the views of single branches, e.g. `{full: 128}`; null keeps `size` for all.
        box_threshold: boxes with a lower score are not used.
        val_fraction: fraction of the training rows to hold out for validation; 0 holds none out.
        val_group: metadata column (site, physical object); rows with the same value are held out together.
        val_from: which rows to hold out: `random`, or the `end` of each class, for video frames.
        num_parts: number of parts of an iFAM model; null keeps the model's default.
        part_presence: weight of the iFAM loss that encourages each part to occur.
        part_equivariance: weight of the iFAM loss that encourages parts to move with the image.
        part_variation: weight of the iFAM loss that encourages connected parts (total variation).
        part_entropy: weight of the iFAM loss that encourages each patch to belong to one part.
        part_orthogonality: weight of the iFAM loss that encourages parts to differ.
        part_background: weight of the iFAM loss that encourages background at the border.
        trainable: `all`, or `head` to freeze the backbones, including their batch-norm statistics.
        frozen_stride: freeze the stem and the stages of the backbones up to this output stride, e.g. 8, including their
            batch-norm statistics; 0 freezes none. Not for ViTs, whose stride is the same throughout.
        epochs: passes over the training rows.
        batch_size: rows per optimizer step, over all processes and accumulation steps.
        grad_accumulation: number of parts into which each batch is split to save memory. The result is the same as with one part,
            except for batch norm, which sees one part at a time.
        branch_backward: `joint`, or `separate` to run the forward and backward pass of one branch after the other, which needs
            about half the memory for two branches. The gradients are the same, except that dropout draws other positions.
        balanced: draw equally many rows of every class, or of every group if there is a `group`, in each epoch; the length of an
            epoch stays the same.
        group: metadata column (background, site); the groups are the combinations of a class and a value of this column.
        objective: `erm` minimizes the mean loss, `group_dro` that of the worst groups (arXiv 1911.08731).
        group_step: step size of the weights that `group_dro` gives to the groups; None for 0.01.
        jtt: run whose misclassified training rows are drawn `jtt_factor` times per epoch: the second stage of JTT
            (arXiv 2107.09044). Keep it in place until the run is finished.
        jtt_factor: see `jtt`; None for 20. Choose it on validation rows.
        optimizer: a name of `timm.optim.list_optimizers()`; norms, biases and what the backbone excludes get no weight decay.
        lr: peak learning rate, reached after the warm-up, followed by cosine decay to zero.
        weight_decay: weight decay of the optimizer.
        momentum: momentum, for optimizers that take one.
        layer_decay: factor of the learning rate from each layer of the backbone to the previous one (arXiv 2106.08254); 1 is off.
        warmup: fraction of all steps in which the learning rate rises linearly.
        clip_grad: maximum norm of the gradients; 0 is off.
        label_smoothing: label smoothing of the cross-entropy.
        consistency: weight of the divergence between the predictions for an object on its own and on another training image's
            background, for full, and for fg if it is a `crop`. Costs one more pass, forward and backward, and one more view of
            each of these branches per row. 0 is off.
        scale: minimum area of the random crop relative to the image; 1 is off.
        flip: probability of a horizontal flip.
        color: strength of brightness, contrast and saturation jitter; 0 is off.
        box_jitter: maximum shift of each edge of the box, relative to its side.
        occlusion: probability that a part of the object is covered by noise.
        background_swap: probability that a training image gets the background of another.
        mixup: alpha of mixup (arXiv 1710.09412); 0 is off.
        cutmix: alpha of cutmix (arXiv 1905.04899); 0 is off.
        mix_probability: fraction of the batches to which mixup or cutmix is applied.
        ema: decay of an exponential moving average of the weights, which is then evaluated and saved; 0 is off.
        best_metric: metric on the validation rows that selects the epoch to keep, e.g. fused_accuracy; `none` keeps the last.
        patience: stop after this many epochs without a new best one; 0 is off.
        precision: fp32, or bf16 or fp16 under autocast; the weights stay fp32. `auto` is bf16 where that is faster, else fp32;
            the run records which.
        channels_last: use the channels-last memory layout; same result up to rounding, faster for most convolutions. `auto`
            uses it for convolutional backbones.
        cut: where views are cut: by the `workers` that load the images, or on the `device` that trains, which leaves them less to
            do. The views are the same up to rounding. The device gets whole augmented images, of all `grad_accumulation` parts.
        compile: compile the backbone with `torch.compile`, which takes minutes at the start.
        cuda_graphs: replay the blocks of an fg that drops tokens (fg_mode `tokens`, or iFAM) as CUDA graphs, which helps where
            launching many short kernels takes longer than running them; on GPUs. Experimental: never tested on one.
        sync_batch_norm: under torchrun, batch norm uses the statistics of all processes' rows, not of its own process; on GPUs.
        seed: random seed of weights, order and augmentation.
        workers: processes that load images; the result does not depend on it.

    >>> Recipe("l2r2_convnext_tiny", lr=1e-4).epochs
    20
    """

    model: str
    pretrained: bool = True
    init: str | None = None
    backbone: dict[str, Any] | None = None
    branches: tuple[str, ...] = ("full", "fg")
    shared: bool = True
    fusion: str = "robust"
    fusion_inputs: tuple[str, ...] | None = None
    threshold: float | None = None
    drop: float = 0.0
    drop_path: float = 0.0
    box_head: bool = False
    mask_head: bool = False
    prototype_dim: int = 0
    grad_checkpointing: bool = False
    # views and rows
    fg_mode: str | None = None
    bg: str | None = None
    square: bool | None = None
    patch: int | None = None
    fill: tuple[int, ...] | None = None
    interpolation: str | None = None
    mode: str | None = None
    decode: str | None = None
    margin: float = 0.0
    late_stage: str = "last"
    late_pool: str = "mask"
    coverage: float = 0.25
    size: int | None = None
    sizes: dict[str, int] | None = None
    box_threshold: float = BOX_THRESHOLD
    val_fraction: float = 0.0
    val_group: str | None = None
    val_from: str = "random"
    # parts of an iFAM model
    num_parts: int | None = None
    part_presence: float = 1.0
    part_equivariance: float = 1.0
    part_variation: float = 1.0
    part_entropy: float = 1.0
    part_orthogonality: float = 1.0
    part_background: float = 2.0
    # optimization
    trainable: str = "all"
    frozen_stride: int = 0
    epochs: int = 20
    batch_size: int = 32
    grad_accumulation: int = 1
    branch_backward: str = "joint"
    balanced: bool = False
    group: str | None = None
    objective: str = "erm"
    jtt: str | None = None
    jtt_factor: int | None = None
    group_step: float | None = None
    optimizer: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: float = 1.0
    warmup: float = 0.1
    clip_grad: float = 1.0
    label_smoothing: float = 0.1
    consistency: float = 0.0
    # augmentation
    scale: float = 0.5
    flip: float = 0.5
    color: float = 0.2
    box_jitter: float = 0.1
    occlusion: float = 0.0
    background_swap: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    # which weights are kept
    ema: float = 0.0
    best_metric: str = NO_METRIC
    patience: int = 0
    # computation
    precision: str = AUTO
    channels_last: Literal["auto", True, False] = AUTO
    cut: str = "workers"
    compile: bool = False
    cuda_graphs: bool = False
    sync_batch_norm: bool = False
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        self._check_ranges()
        if (self.val_group or self.val_from != "random") and not self.val_fraction:
            raise L2R2Error(f"val_{'group' if self.val_group else 'from'} has no effect without val_fraction; set both.")
        if self.grad_accumulation > self.batch_size:
            raise L2R2Error(f"grad_accumulation {self.grad_accumulation} is larger than batch_size {self.batch_size}; lower it.")
        self._check_best()
        self._check_groups()
        if self.consistency and (self.mixup or self.cutmix):
            raise L2R2Error("mixup and cutmix mix other images into each view that consistency compares; use one or the other.")
        if self.init is not None and not self.pretrained:
            raise L2R2Error("init loads weights, but pretrained is false; use one or the other.")
        own = {"init": self.init is not None, "pretrained=false": not self.pretrained, "prototype_dim": self.prototype_dim != 0}
        if self.model.startswith("vlm:") and any(own.values()):
            raise L2R2Error(f"A vlm: model brings its own weights; leave {next(key for key in own if own[key])} out.")
        if self.frozen_stride and not self.pretrained:
            raise L2R2Error("frozen_stride keeps pretrained weights, but pretrained is false; leave one of them out.")
        for head, targets in (("box", "boxes"), ("mask", "masks")):
            if getattr(self, f"{head}_head") and (self.mixup or self.cutmix):
                raise L2R2Error(
                    f"mixup and cutmix cannot mix the {targets} that a {head} head is trained on; use one or the other."
                )
        if self.sync_batch_norm and self.trainable == "head":
            raise L2R2Error("sync_batch_norm has no effect with trainable=head, which freezes the statistics; leave it out.")
        if self.cuda_graphs and self.grad_checkpointing:
            raise L2R2Error("cuda_graphs stores the activations that grad_checkpointing computes again; use one or the other.")
        self.augment()
        self.part_weights()
        if self.fusion in FUSIONS and FUSIONS[self.fusion].needs_fit:
            raise L2R2Error(f'Fusion "{self.fusion}" must be fitted: train with another fusion, then run `l2r2 fuse`.')
        if self.threshold is not None and self.fusion != "robust":
            raise L2R2Error(f'threshold is for the fusion "robust", not for "{self.fusion}".')

    def _check_ranges(self) -> None:
        for name, most in {"epochs": 100_000, "batch_size": 1_000_000, "grad_accumulation": 1_000_000}.items():
            if not 1 <= getattr(self, name) <= most:
                raise L2R2Error(f"{name} must lie between 1 and {most:,}, got {getattr(self, name)}.")
        if not 0 <= self.prototype_dim <= 65536:
            raise L2R2Error(f"prototype_dim must lie between 0 and 65536, got {self.prototype_dim}.")
        if self.workers > 256:
            raise L2R2Error(f"workers must lie between 0 and 256, got {self.workers}.")
        for name in ("box_threshold", "warmup", "label_smoothing", "mix_probability", "layer_decay", "background_swap"):
            if not 0 <= getattr(self, name) <= 1:
                raise L2R2Error(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        for name in ("drop", "drop_path", "ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise L2R2Error(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        for name in ("weight_decay", "clip_grad", "mixup", "cutmix", "workers", "patience", "consistency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise L2R2Error(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.val_fraction <= 0.5:
            raise L2R2Error(f"val_fraction must lie between 0 and 0.5, got {self.val_fraction}.")
        for name in ("lr", "layer_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise L2R2Error(f"{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise L2R2Error(f"seed must lie between 0 and 4294967295, got {self.seed}.")
        if self.size is not None and not 1 <= self.size <= 4096:
            raise L2R2Error(f"size must lie between 1 and 4096 pixels, got {self.size}.")
        if lacking := [branch for branch in ViewSpec(sizes=self.sizes or {}).sizes if branch not in self.branches]:
            raise L2R2Error(f"sizes has a size for {lacking[0]}, but this model has {', '.join(self.branches)}; leave it out.")
        known: dict[str, tuple[Any, ...]] = {"trainable": TRAINABLE, "precision": PRECISIONS, "best_metric": METRICS, "cut": CUTS}
        known |= {"val_from": VAL_FROM, "branch_backward": BACKWARDS, "frozen_stride": STRIDES, "objective": OBJECTIVES}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise L2R2Error(f'Unknown {name} "{getattr(self, name)}"; choose from {", ".join(map(str, choices))}.')
        if self.channels_last not in (AUTO, True, False):
            raise L2R2Error(f"channels_last must be auto, true or false, got {self.channels_last!r}.")

    def _check_best(self) -> None:
        branch = self.best_metric.removesuffix("_accuracy").removesuffix("_macro")
        if branch in BRANCHES and branch not in self.branches:
            has = ", ".join(self.branches)
            raise L2R2Error(f"best_metric {self.best_metric} needs the branch {branch}; this model has {has}.")
        if self.patience and self.best_metric == NO_METRIC:
            raise L2R2Error("patience needs a metric to improve; set best_metric too, e.g. fused_accuracy.")

    def _check_groups(self) -> None:
        if self.jtt is not None and (self.balanced or self.objective != "erm"):
            raise L2R2Error("jtt draws the rows by itself; leave balanced and group_dro out.")
        if self.jtt_factor is not None and self.jtt is None:
            raise L2R2Error("jtt_factor has no effect without jtt; set jtt to a run, or leave it out.")
        if self.jtt_factor is not None and not 2 <= self.jtt_factor <= 10_000:
            raise L2R2Error(f"jtt_factor must lie between 2 and 10,000, got {self.jtt_factor}.")
        if self.group_step is not None and (self.objective != "group_dro" or not 0 < self.group_step < math.inf):
            raise L2R2Error(f"group_step must be above 0, for objective group_dro; got {self.group_step} for {self.objective}.")
        if self.objective == "erm":
            if self.group and not self.balanced:
                raise L2R2Error("group has no effect alone; set objective to group_dro, or balanced to true.")
            return
        if not self.group:
            raise L2R2Error("objective group_dro needs groups; set group to a metadata column, e.g. group=background.")
        if self.grad_accumulation > 1:
            raise L2R2Error("group_dro weighs the groups of a whole batch; set grad_accumulation to 1.")
        if self.mixup or self.cutmix:
            raise L2R2Error("mixup and cutmix mix images of different groups; do not use them with group_dro.")

    @classmethod
    def default(cls, model: str, pretrained: bool, **changes: Any) -> Recipe:
        """Make the default recipe of a model.

        Args:
            model: see `Recipe`.
            pretrained: use the built-in recipe `finetune` if true, else `scratch`.
            changes: keys to override; None leaves the recipe's value.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        return cls.read("finetune" if pretrained else "scratch", {"model": model, "pretrained": pretrained, **given})

    @classmethod
    def read(cls, source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Read a built-in recipe, or a YAML file such as the recipe.yaml of a run.

        If an `init` but no model is given, the model and its views are those of that checkpoint, unless a key says otherwise.

        Args:
            source: one of `builtin_recipes()`, or a file.
            changes: keys to override.

        Raises:
            L2R2Error: when there is no such recipe or file, a key is unknown, a value is invalid, or the model is missing.
        """
        values = {**read_keys(source), **(changes or {})}
        if values.get("init") and not values.get("model"):
            from .init import InitCheckpoint  # imports the models, which takes seconds

            given = {key: value for key, value in values.items() if key != "model"}
            values = {**InitCheckpoint.read(str(values["init"])).recipe_keys(), **given}
        if not values.get("model"):
            raise L2R2Error(f"{source}: no model is set; pass --model (see `l2r2 list`) or --init.")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Make a recipe from plain values, the inverse of `to_dict`.

        Raises:
            L2R2Error: when a key is unknown or a value is invalid.
        """
        return config.from_dict(cls, data, "recipe key", parse_numbers=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or YAML."""
        return config.to_dict(self)

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `read` accepts."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def augment(self) -> Augment:
        """Return the augmentation of the training images."""
        return Augment(self.scale, self.flip, self.color, self.box_jitter, occlusion=self.occlusion)

    def part_weights(self) -> PartWeights:
        """Return the weights of the losses on the parts of an iFAM model."""
        return PartWeights(**{f.name: getattr(self, f"part_{f.name}") for f in fields(PartWeights)})

    def fusion_config(self) -> dict[str, Any]:
        """Return the config of the fusion, as `L2R2` takes it."""
        given = {"threshold": self.threshold, "inputs": None if self.fusion_inputs is None else list(self.fusion_inputs)}
        return {"name": self.fusion, **{key: value for key, value in given.items() if value is not None}}

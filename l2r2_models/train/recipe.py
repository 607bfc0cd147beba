"""How a model is trained: one flat, serialized recipe. It is saved with the run, and a run continues only under the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .. import config
from ..boxes.detections import BOX_THRESHOLD
from ..data.augment import Augment
from ..data.splits import VAL_FROM
from ..errors import L2R2Error
from ..fusion import FUSIONS
from ..io import parse_yaml, read_text
from ..models.l2r2 import BRANCHES
from ..models.parts import PartWeights

TRAINABLE = ("all", "head")
PRECISIONS = ("fp32", "bf16", "fp16")
NO_METRIC = "none"
METRICS = (NO_METRIC, *(f"{name}_{kind}accuracy" for kind in ("", "macro_") for name in ("fused", *BRANCHES)))


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run.

    Attributes:
        model: registered architecture, with or without a tag; or a timm backbone for the generic model as `timm:NAME`.
        pretrained: start from weights instead of random ones: those of `init`, or of the tag (downloaded once by timm).
        init: start from a checkpoint: a run's folder, a Hub repository, or a timm classifier saved in timm's layout. Its backbone
            must be the model's; its heads are taken where the classes are the same. It must stay until the run is finished.
        backbone: more arguments of the timm backbone, e.g. `{patch_size: 8, depth: 6}` for a small ViT from scratch.
        branches, shared, fusion, threshold: see `L2R2`; `threshold` is that of the `robust` fusion.
        drop, drop_path: dropout before the heads; stochastic depth in the backbone (arXiv 1603.09382), where timm has it.
        box_head: also train a head that finds the object's box, from the boxes of the rows; rows in which none was found are its
            negatives, those where nobody looked (a localizer failed, a box file does not name the image) teach it nothing.
        grad_checkpointing: compute activations again in the backward pass instead of keeping them; less memory.
        fg_mode, bg, square, fill, interpolation, mode: see `ViewSpec`; None is the model's own.
        margin, late_stage, late_pool, coverage, size: see `ViewSpec`; fg_mode None is the model's own kind, size None its own
            input size.
        box_threshold: boxes with a lower score count as not found.
        val_fraction, val_group, val_from: hold so many training rows out for validation, see `hold_out` (`take` is val_from); 0
            holds none out.
        num_parts: of an ifam model; None is the model's own number.
        part_presence, part_equivariance, part_variation, part_entropy, part_orthogonality, part_background: weights of the losses
            that shape an ifam model's parts, see `PartWeights`.
        trainable: `all`, or `head`: the backbones stay as they are, their batch-norm statistics included.
        epochs: passes over the rows.
        batch_size: rows of one step of the optimizer, of all processes and parts together.
        grad_accumulation: parts that a batch is computed in, one after the other, to fit into memory. The result is that of one
            part, but for batch norm, which sees one part at a time.
        balanced: draw rows so that each epoch has equally many of every class; as many rows an epoch as without.
        optimizer: a name of `timm.optim.list_optimizers()`; norms, biases and what the backbone names have no weight decay.
        lr, weight_decay, momentum, warmup, clip_grad: the peak rate is reached after a linear warm-up (a part of all steps), then
            falls as a cosine to zero; momentum is for optimizers that take one; gradients are clipped to this norm, 0 never.
        layer_decay: factor of the rate from each layer of the backbone to the one before it (arXiv 2106.08254); 1: none.
        label_smoothing: see `torch.nn.functional.cross_entropy`.
        scale, flip, color, box_jitter, occlusion: see `Augment`.
        background_swap: probability of a training image to get the background of another, see `ViewDataset`.
        mixup, cutmix, mix_probability: see `ViewMixup`; alphas, 0 is off.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and saved; 0: none.
        best_metric: keep the epoch that is best by this figure on the validation rows; `none` keeps the last epoch.
        patience: stop after so many epochs without a new best one; 0 never.
        precision: fp32, or bf16 or fp16 under autocast; the weights stay fp32.
        channels_last: memory layout of images and filters; the same result up to rounding, quicker for most convolutions.
        seed: of weights, order and augmentation.
        workers: processes that load images; the result does not depend on it.
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
    grad_checkpointing: bool = False
    # views and rows
    fg_mode: str | None = None
    bg: str | None = None
    square: bool | None = None
    fill: tuple[int, ...] | None = None
    interpolation: str | None = None
    mode: str | None = None
    margin: float = 0.0
    late_stage: str = "last"
    late_pool: str = "mask"
    coverage: float = 0.25
    size: int | None = None
    box_threshold: float = BOX_THRESHOLD
    val_fraction: float = 0.0
    val_group: str | None = None
    val_from: str = "random"
    # parts of an ifam model
    num_parts: int | None = None
    part_presence: float = 1.0
    part_equivariance: float = 1.0
    part_variation: float = 1.0
    part_entropy: float = 1.0
    part_orthogonality: float = 1.0
    part_background: float = 2.0
    # optimization
    trainable: str = "all"
    epochs: int = 20
    batch_size: int = 32
    grad_accumulation: int = 1
    balanced: bool = False
    optimizer: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: float = 1.0
    warmup: float = 0.1
    clip_grad: float = 1.0
    label_smoothing: float = 0.1
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
    # how it is computed
    precision: str = "fp32"
    channels_last: bool = False
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        self._check_ranges()
        if (self.val_group or self.val_from != "random") and not self.val_fraction:
            raise L2R2Error(f"val_{'group' if self.val_group else 'from'} says how to hold rows out; give a val_fraction too.")
        if self.grad_accumulation > self.batch_size:
            raise L2R2Error(f"grad_accumulation {self.grad_accumulation} is more than the {self.batch_size} rows of a batch.")
        self._check_best()
        if self.init is not None and not self.pretrained:
            raise L2R2Error("init gives the weights to start from, so pretrained cannot be false; leave one of both out.")
        if self.box_head and (self.mixup or self.cutmix):
            raise L2R2Error("mixup and cutmix mix images, but not the boxes that a box head learns from; leave one of both out.")
        self.augment()
        self.part_weights()
        if self.fusion in FUSIONS and FUSIONS[self.fusion].needs_fit:
            raise L2R2Error(f'Fusion "{self.fusion}" must be fitted: train with another one, then `l2r2 fuse` it.')
        if self.threshold is not None and self.fusion != "robust":
            raise L2R2Error(f'threshold belongs to the fusion "robust", not to "{self.fusion}".')

    def _check_ranges(self) -> None:
        for name, most in {"epochs": 100_000, "batch_size": 1_000_000, "grad_accumulation": 1_000_000}.items():
            if not 1 <= getattr(self, name) <= most:
                raise L2R2Error(f"{name} must lie between 1 and {most:,}, got {getattr(self, name)}.")
        if self.workers > 256:
            raise L2R2Error(f"workers are processes of this machine, at most 256, got {self.workers}.")
        for name in ("box_threshold", "warmup", "label_smoothing", "mix_probability", "layer_decay", "background_swap"):
            if not 0 <= getattr(self, name) <= 1:
                raise L2R2Error(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        for name in ("drop", "drop_path", "ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise L2R2Error(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        for name in ("weight_decay", "clip_grad", "mixup", "cutmix", "workers", "patience"):
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
        known = {"trainable": TRAINABLE, "precision": PRECISIONS, "best_metric": METRICS, "val_from": VAL_FROM}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise L2R2Error(f'Unknown {name} "{getattr(self, name)}"; choose from {", ".join(choices)}.')

    def _check_best(self) -> None:
        branch = self.best_metric.removesuffix("_accuracy").removesuffix("_macro")
        if branch in BRANCHES and branch not in self.branches:
            has = ", ".join(self.branches)
            raise L2R2Error(f"best_metric {self.best_metric} needs the branch {branch}; this model has {has}.")
        if self.patience and self.best_metric == NO_METRIC:
            raise L2R2Error("patience counts epochs without a new best one; give a best_metric too, e.g. fused_accuracy.")

    @classmethod
    def default(cls, model: str, pretrained: bool, **changes: Any) -> Recipe:
        """The built-in recipe `finetune` for pretrained weights, else `scratch`; `changes` that are None are left out."""
        given = {key: value for key, value in changes.items() if value is not None}
        return cls.read("finetune" if pretrained else "scratch", {"model": model, "pretrained": pretrained, **given})

    @classmethod
    def read(cls, source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """A built-in recipe by its name, or a YAML file such as the recipe.yaml of a run, with changes.

        Without a model but with an `init`, the model and its views are those of that checkpoint, where no key says otherwise.

        Args:
            source: one of `builtin_recipes()`, or a file.
            changes: keys that override.

        Raises:
            L2R2Error: no such recipe or file, an unknown key, a value of another kind, no model, or an `init` without one.
        """
        values = {**read_keys(source), **(changes or {})}
        if values.get("init") and not values.get("model"):
            from .init import InitCheckpoint  # knows the models, which take seconds to import

            given = {key: value for key, value in values.items() if key != "model"}
            values = {**InitCheckpoint.read(str(values["init"])).recipe_keys(), **given}
        if not values.get("model"):
            raise L2R2Error(f"{source}: names no model; give --model, see `l2r2 list`, or --init.")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """From plain values, as `to_dict` gives them.

        Raises:
            L2R2Error: an unknown key, or a value of another kind.
        """
        return config.from_dict(cls, data, "recipe key", parse_numbers=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return config.to_dict(self)

    def to_yaml(self) -> str:
        """What `read` takes for this very recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def augment(self) -> Augment:
        return Augment(self.scale, self.flip, self.color, self.box_jitter, occlusion=self.occlusion)

    def part_weights(self) -> PartWeights:
        return PartWeights(**{f.name: getattr(self, f"part_{f.name}") for f in fields(PartWeights)})

    def fusion_config(self) -> dict[str, Any]:
        given = {"threshold": self.threshold, "inputs": None if self.fusion_inputs is None else list(self.fusion_inputs)}
        return {"name": self.fusion, **{key: value for key, value in given.items() if value is not None}}


def builtin_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    return tuple(sorted(f.name.removesuffix(".yaml") for f in _builtin_folder().iterdir() if f.name.endswith(".yaml")))


def read_keys(source: str | Path) -> dict[str, Any]:
    """The keys that a recipe sets, see `Recipe.read`.

    Raises:
        L2R2Error: no such recipe or file, or no mapping in it.
    """
    name, file = str(source), Path(source)
    if name in builtin_recipes():
        text = (_builtin_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = read_text(file)
        except L2R2Error as error:
            why = str(error).removeprefix(f"{name}: ").rstrip(".")
            raise L2R2Error(f"{name}: {why}; give a YAML file or one of {', '.join(builtin_recipes())}.") from None
    values = parse_yaml(text, name)
    if not isinstance(values, dict):
        raise L2R2Error(f"{name}: a recipe is a YAML mapping of keys to values.")
    return values


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["lr=1e-3", "branches=[full]"]` -> keys and values, each value read as YAML.

    Raises:
        L2R2Error: no `key=value`, a key given twice, or no YAML.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise L2R2Error(f'--set takes key=value, got "{setting}".')
        if key in values:
            raise L2R2Error(f"--set gives {key} twice.")
        values[key] = parse_yaml(text, f"--set {setting}")
    return values


def _builtin_folder() -> Any:
    return resources.files(__package__) / "recipe_files"

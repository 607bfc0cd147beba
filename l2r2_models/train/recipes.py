"""How a model is trained: one flat, serialised recipe. It is saved with the run, and a run continues only under the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..data.augment import Augment
from ..errors import L2R2Error
from ..fusion import FUSIONS


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run.

    Attributes:
        model: registered architecture, with or without a tag; or a timm backbone for the generic model as `timm:NAME`.
        pretrained: start from the tag's weights (downloaded once by timm) instead of random ones.
        branches, shared, fusion, threshold: see `L2R2`; `threshold` is that of the `robust` fusion.
        fg, margin, size: see `ViewSpec`; size None is the model's own input size.
        box_threshold: boxes with a lower score count as not found.
        val_fraction, val_group: hold so many training rows out for validation, see `hold_out`; 0 holds none out.
        epochs, batch_size, lr, weight_decay, warmup, label_smoothing: AdamW with linear warm-up (a part of all steps), then
            cosine to zero.
        scale, flip, colour, box_jitter: see `Augment`.
        seed: of weights, order and augmentation.
        workers: processes that load images; the result does not depend on it.
    """

    model: str
    pretrained: bool = True
    branches: tuple[str, ...] = ("full", "fg")
    shared: bool = True
    fusion: str = "robust"
    threshold: float | None = None
    fg: str = "crop"
    margin: float = 0.0
    size: int | None = None
    box_threshold: float = 0.2
    val_fraction: float = 0.0
    val_group: str | None = None
    epochs: int = 20
    batch_size: int = 32
    lr: float = 2e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    scale: float = 0.5
    flip: float = 0.5
    colour: float = 0.2
    box_jitter: float = 0.1
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise L2R2Error(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("box_threshold", "warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise L2R2Error(f"{name} must lie between 0 and 1, got {getattr(self, name)}.")
        if not 0 <= self.val_fraction <= 0.5:
            raise L2R2Error(f"val_fraction must lie between 0 and 0.5, got {self.val_fraction}.")
        if self.val_group and not self.val_fraction:
            raise L2R2Error("val_group says how to hold rows out; give a val_fraction too.")
        if not 0 < self.lr < math.inf:
            raise L2R2Error(f"lr must be above 0, got {self.lr}.")
        if not 0 <= self.weight_decay < math.inf:
            raise L2R2Error(f"weight_decay must be at least 0, got {self.weight_decay}.")
        if not 0 <= self.seed < 2**32:
            raise L2R2Error(f"seed must lie between 0 and 4294967295, got {self.seed}.")
        if self.workers < 0:
            raise L2R2Error(f"workers must be at least 0, got {self.workers}.")
        if self.size is not None and not 1 <= self.size <= 4096:
            raise L2R2Error(f"size must lie between 1 and 4096 pixels, got {self.size}.")
        self.augment()
        if self.fusion in FUSIONS and FUSIONS[self.fusion].needs_fit:
            raise L2R2Error(f'Fusion "{self.fusion}" must be fitted: train with another one, then `l2r2 fuse` it.')
        if self.threshold is not None and self.fusion != "robust":
            raise L2R2Error(f'threshold belongs to the fusion "robust", not to "{self.fusion}".')

    @classmethod
    def default(cls, model: str, pretrained: bool, **changes: Any) -> Recipe:
        """Defaults for fine-tuning pretrained weights, or for training from scratch; `changes` that are None are left out."""
        base = cls(model, pretrained=pretrained)
        if not pretrained:
            base = replace(base, lr=1e-3)
        return replace(base, **{k: v for k, v in changes.items() if v is not None})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """From a saved run; an unknown key is an error."""
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(data) - set(names)):
            raise L2R2Error(f"Unknown recipe key {', '.join(unknown)}; choose from {', '.join(names)}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def augment(self) -> Augment:
        return Augment(self.scale, self.flip, self.colour, self.box_jitter)

    def fusion_config(self) -> dict[str, Any]:
        return {"name": self.fusion, **({} if self.threshold is None else {"threshold": self.threshold})}

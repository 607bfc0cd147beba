"""The base of localizers that look at the features of a network, without a box or prompt."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from PIL.Image import new
from torch import Tensor

from ..errors import L2R2Error
from ..models.weights import create_pretrained
from ..views import ViewSpec
from .base import Context, Localizer, LocalizerSpec
from .model_based import ModelLocalizer


class FeatureLocalizer(ModelLocalizer):
    """Base class of localizers on feature maps; the source is a run, a Hub id, or `timm:NAME.TAG`.

    The prefix `timm:` may be left out if there is no folder of that name. The option `size`, if a subclass has it, is the side
    of the view in pixels; the position embeddings of a ViT are resampled to it.
    """

    source = "a run, a Hub id or timm:NAME"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        if timm.is_model(spec.source) and not Path(spec.source).exists():
            spec = replace(spec, source=f"timm:{spec.source}")
        if spec.source.startswith("timm:"):
            self._load_from_timm(spec, context)
        else:
            super().__init__(spec, context)
        size = self.options["size"]
        if size not in (None, self.model.view_spec.size_of("full")):
            self._resize(size)

    def _load_from_timm(self, spec: LocalizerSpec, context: Context) -> None:
        Localizer.__init__(self, spec, context)
        name = spec.source.removeprefix("timm:")
        try:
            backbone: Any = create_pretrained(name, num_classes=0)
        except Exception as error:  # timm, huggingface_hub and torch each raise their own
            raise L2R2Error(f"{name}: timm cannot load this model ({' '.join(str(error).split())[:200]}).") from error
        views = ViewSpec.from_pretrained_cfg(backbone.pretrained_cfg)
        self.model = SimpleNamespace(backbone=backbone.to(context.device).eval(), view_spec=views)  # type: ignore[assignment]

    @torch.no_grad()
    def _resize(self, size: int) -> None:
        """Make the network take views of `size` pixels.

        Raises:
            L2R2Error: when it does not take that size.
        """
        views, _ = self.full_views([new("RGB", (size, size))], size)
        backbone = self.model.backbone
        try:
            if hasattr(backbone, "set_input_size"):
                backbone = copy.deepcopy(backbone)  # the original may be in use elsewhere
                backbone.set_input_size((size, size))
            self.model = SimpleNamespace(backbone=backbone, view_spec=self.model.view_spec)  # type: ignore[assignment]
            self.features_of(views)
        except (AssertionError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise L2R2Error(f"{self.spec}: this network does not take views of {size} pixels ({why}).") from error

    @abstractmethod
    def features_of(self, views: Tensor) -> list[Tensor]:
        """Compute the maps `[B, C, h, w]` that the localizer looks at, fine to coarse."""

    @property
    def weights(self) -> str | None:
        """Digest of the checkpoint; None for a model of timm, whose name says which weights it has."""
        return None if self.spec.source.startswith("timm:") else super().weights


def finite(values: Tensor) -> Tensor:
    """Return the values.

    Raises:
        L2R2Error: when one is not finite.
    """
    if not bool(values.isfinite().all()):
        raise L2R2Error("the network's features are not finite; its training has diverged.")
    return values

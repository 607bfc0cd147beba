"""The interface that timm's scripts and tests and transformers' wrapper expect of a timm model, forwarded to the backbone."""

# no `from __future__ import annotations`: see l2r2.py

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..errors import L2R2Error
from ..fusion import create_fusion
from .cosine_head import CosineHead

try:  # newer timm records the input size that a model was built with, and refuses to save a model with another
    from timm.models._input import update_model_input_size
except ImportError:

    def update_model_input_size(model: nn.Module, img_size: Any, **model_args: Any) -> None:  # type: ignore[misc]
        """Do nothing: older timm does not record the input size."""


class TimmContract(nn.Module):
    """The methods of a timm model that `L2R2` inherits; the subclass provides the attributes that they use."""

    if TYPE_CHECKING:  # TorchScript would interpret class annotations
        backbone: Any
        branch_backbones: Any
        heads: Any
        fusion: Any
        box_head: Any
        mask_head: Any
        branches: tuple[str, ...]
        head_hidden_size: int
        prototype_dim: int
        backbone_kwargs: dict[str, Any]
        _view_spec: Any

        def backbone_prefixes(self) -> list[str]:
            """See `L2R2.backbone_prefixes`."""

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone's unpooled features of images `[B, C, H, W]`."""
        features: Tensor = self.backbone.forward_features(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The first head's logits from unpooled features, or with `pre_logits` the pooled features."""
        features: Tensor = self.backbone.forward_head(x, pre_logits=pre_logits)
        if pre_logits:
            return features
        logits: Tensor = self.heads[self.branches[0]](features)
        return logits

    @torch.jit.ignore
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's intermediate features; see timm."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    @torch.jit.ignore
    def prune_intermediate_layers(self, indices: Any = 1, prune_norm: bool = False, prune_head: bool = True) -> Any:
        """Remove the backbone's later layers, and with `prune_head` the heads; see timm."""
        if prune_head:
            self.heads = nn.ModuleDict({b: nn.Identity() for b in self.branches})
            self.branch_backbones, self.box_head, self.mask_head = nn.ModuleDict(), None, None
        return self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)

    @torch.jit.ignore
    def get_classifier(self) -> nn.ModuleDict:
        """The heads by branch."""
        heads: nn.ModuleDict = self.heads
        return heads

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the heads by new ones for `num_classes`, and the fusion by an unfitted one."""
        self.num_classes = num_classes
        pool = () if global_pool is None else (global_pool,)  # older timm takes None for "no pooling"
        for backbone in self._backbones():
            backbone.reset_classifier(0, *pool)
        reference = next(self.parameters())
        with torch.device(reference.device):
            self.heads = nn.ModuleDict({b: self._new_head(b) for b in self.branches}).to(reference.dtype)
            # parameters fitted on other classes are meaningless
            self.fusion = create_fusion(self._unfitted(), self.branches, num_classes).to(reference.dtype)
        for module in (self.heads, self.fusion):
            module.train(self.training)

    def _unfitted(self) -> dict[str, Any]:
        """The fusion's config without fitted parameters."""
        config: dict[str, Any] = self.fusion.unfitted()
        return config

    @torch.jit.ignore
    def _set_input_size(self, img_size: Any = None, **kwargs: Any) -> None:
        sides = {img_size} if img_size is None or isinstance(img_size, int) else set(img_size)
        if len(sides) != 1:
            raise L2R2Error(f"Views are square; pass one side in pixels to set_input_size, not {img_size}.")
        side = sides.pop()
        for backbone in self._backbones():
            backbone.set_input_size(img_size=img_size, **kwargs)
        changed = {name: value for name, value in {"img_size": side, **kwargs}.items() if value is not None}
        self.backbone_kwargs.update(changed)  # these rebuild the model when a checkpoint is loaded
        update_model_input_size(self, self.backbone_kwargs.get("img_size"), **kwargs)
        if side is not None and self._view_spec is not None:
            self._view_spec = replace(self._view_spec, size=side, sizes={})

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing of all backbones on or off."""
        for backbone in self._backbones():
            backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else set()
        return {prefix + name for prefix in self.backbone_prefixes() for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The backbone's layer groups for layer-wise learning rates; see timm."""
        prefix = r"^(?:backbone|branch_backbones\.\w+)\.(?:"

        def wrap(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return prefix + pattern.replace("^", "") + ")"
            return [(wrap(p), *rest) for p, *rest in pattern]

        return {name: wrap(pattern) for name, pattern in self.backbone.group_matcher(coarse=coarse).items()}

    def _backbones(self) -> Iterator[Any]:
        yield self.backbone
        yield from self.branch_backbones.values()

    def _new_head(self, branch: str) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        if self.prototype_dim:
            return CosineHead(self.head_hidden_size, self.prototype_dim, self.num_classes)
        head = nn.Linear(self.head_hidden_size, self.num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

"""The zero-shot network: an `L2R2` whose backbone is an image tower and whose heads are class prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import L2R2Error
from ..fusion import INPUTS, create_fusion
from ..models.l2r2 import L2R2
from ..models.timm_contract import TimmContract
from ..views import ViewSpec, check_branches


class PrototypeHead(nn.Module):
    """Logits from the cosine similarity of image embeddings and class prototypes: `scale * cos + bias`.

    Args:
        prototypes: `[classes, D]` of length 1.
        scale, bias: see `VisionLanguageModel`.

    >>> PrototypeHead(torch.eye(2), scale=10.0)(torch.tensor([[3.0, 0.0]])).tolist()
    [[10.0, 0.0]]
    """

    def __init__(self, prototypes: Tensor, scale: float, bias: float = 0.0) -> None:
        super().__init__()
        self.prototypes: Tensor
        self.register_buffer("prototypes", prototypes)
        self.scale, self.bias = scale, bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `[B, classes]` of image embeddings `[B, D]`."""
        return normalize(x, dim=-1) @ self.prototypes.t() * self.scale + self.bias


class ZeroShotNetwork(L2R2):
    """An L2R2 that is not trained: all branches share the image tower and the class prototypes.

    Confidences are softmax probabilities over the classes, also for models that were trained with a sigmoid per class (SigLIP):
    the branches are compared by how far the best class is ahead of the others, and the shared bias has no effect on that.
    Source: L2R2, sections 3 and 5.2.

    Args:
        tower: network from views `[B, 3, S, S]` to embeddings `[B, D]`.
        prototypes: `[classes, D]` of length 1.
        scale, bias: see `VisionLanguageModel`.
        views: how views are cut.
        name: what the tower was loaded from.
        branches: which of full, fg and bg it has; more can be added with `with_branches`.
        fusion: see `L2R2`.

    Raises:
        L2R2Error: when a branch or the fusion is unknown, or fg would be masked inside the network.
    """

    def __init__(
        self,
        tower: nn.Module,
        prototypes: Tensor,
        scale: float,
        bias: float,
        views: ViewSpec,
        *,
        name: str,
        branches: Sequence[str] = ("full", "fg"),
        fusion: str | Mapping[str, Any] = "max_confidence",
    ) -> None:
        TimmContract.__init__(self)  # not L2R2's, which builds a backbone of timm
        if views.fg.in_network:
            raise L2R2Error(f'{name}: fg_mode "{views.fg_mode}" needs a trained L2R2; use crop, masked_crop or masked.')
        self.pretrained_cfg = {"input_size": (3, views.size, views.size), "mean": views.mean, "std": views.std}
        self.branches = check_branches(branches)
        self.backbone_name, self.backbone_kwargs, self.shared = name, {}, True
        self.num_classes, self.in_chans = len(prototypes), 3
        self.num_features = self.head_hidden_size = prototypes.shape[1]
        self.feature_info, self.prototype_dim = [], prototypes.shape[1]
        self._view_spec, self._fg_mode = views, views.fg_mode
        self.backbone, self.branch_backbones, self.box_head, self.mask_head = tower, nn.ModuleDict(), None, None
        # a copy per branch, because safetensors refuses tensors that share memory
        self.heads = nn.ModuleDict({b: PrototypeHead(prototypes.clone(), scale, bias) for b in self.branches})
        self.fusion = create_fusion(fusion, self.branches, self.num_classes)
        self.requires_grad_(False)

    def with_branches(self, branches: Sequence[str]) -> ZeroShotNetwork:
        """Return a network with the same tower and prototypes and other branches, and the same fusion if it can be kept."""
        head: Any = self.heads[self.branches[0]]
        inputs = [b for b in INPUTS if b in (self.fusion.over or self.branches)]
        keeps = len(inputs) > 1 and set(inputs) <= set(branches)
        fusion = {**self.fusion.config(), "inputs": inputs} if keeps else "max_confidence"
        prototypes, tower, views = head.prototypes, self.backbone, self.view_spec
        name = self.backbone_name
        other = ZeroShotNetwork(tower, prototypes, head.scale, head.bias, views, name=name, branches=branches, fusion=fusion)
        if keeps:
            other.fusion.load_state_dict(self.fusion.state_dict())
        return other.eval()

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Refuse: the heads are made from class names."""
        raise L2R2Error("The heads of a zero-shot model are made from class names; load it again with other names.")

"""A fusion that asks how sure the localizer was (RCOR, `docs/method.md`, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Fusion, register_fusion
from .confidence import confidence


@register_fusion
class ObjectnessMaxConfidence(Fusion):
    """fg answers where its confidence times the box's score is at least the confidence of the surest other branch.

    Of an image's several boxes, the one with the highest product answers for the image. The whole image counts with score 1, and
    so does a box without a score. Source: RCOR (arXiv 2510.00618) [R].
    """

    name = "objectness_max_confidence"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        return self.weigh(fg, context, torch.ones_like(fg[:, 0]))

    def weigh(self, fg: Tensor, context: Tensor, objectness: Tensor) -> Tensor:
        """`combine` with the boxes' scores `[B]` in [0, 1]."""
        branches = torch.cat([fg[None], context])  # [1 + K, B, classes]
        sure = confidence(branches)
        best = torch.cat([sure[:1] * objectness.to(sure), sure[1:]]).argmax(0)  # [B]; fg wins a tie
        return branches.gather(0, best[None, :, None].expand(1, -1, fg.shape[-1]))[0]

"""Fusion that uses the score of the localizer (RCOR; `docs/method.md`, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Fusion, register_fusion
from .confidence import confidence


@register_fusion
class ObjectnessMaxConfidence(Fusion):
    """Use fg where its confidence times the box score is at least the highest confidence of the other branches.

    If an image has several boxes, the one with the highest product gives the prediction for the image. The whole image, and a
    box without a score, have score 1. Source: RCOR (arXiv 2510.00618) [R].
    """

    name = "objectness_max_confidence"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Fuse with a box score of 1 in every row; see `Fusion.combine`."""
        return self.weigh(fg, context, torch.ones_like(fg[:, 0]))

    def weigh(self, fg: Tensor, context: Tensor, objectness: Tensor) -> Tensor:
        """Fuse with the box scores `[B]` in [0, 1]; see `Fusion.weigh`."""
        branches = torch.cat([fg[None], context])  # [1 + K, B, classes]
        sure = confidence(branches)
        best = torch.cat([sure[:1] * objectness.to(sure), sure[1:]]).argmax(0)  # [B]; fg wins a tie
        return branches.gather(0, best[None, :, None].expand(1, -1, fg.shape[-1]))[0]

"""Fusions that compare or average the branches as they are; only `robust` has a parameter (L2R2 3.3 and B.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from .base import Fusion, register_fusion


def confidence(logits: Tensor) -> Tensor:
    """Largest softmax probability of each row: `[..., classes]` -> `[...]`."""
    return logits.softmax(-1).amax(-1)


def most_confident(logits: Tensor) -> Tensor:
    """For each row, the logits of the branch that is surest of itself: `[K, B, classes]` -> `[B, classes]`.

    The earlier branch wins a tie.
    """
    best = confidence(logits).argmax(0)  # [B]
    return logits.gather(0, best[None, :, None].expand(1, -1, logits.shape[-1]))[0]


@register_fusion
class MaxConfidence(Fusion):
    """The branch with the highest confidence answers; at equal confidence fg does. Source: L2R2 3.3 [R]."""

    name = "max_confidence"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        return most_confident(torch.cat([fg[None], context]))


@register_fusion
class Average(Fusion):
    """Mean of the branches' logits. Source: L2R2 3.3 [R]."""

    name = "average"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        return torch.cat([fg[None], context]).mean(0)


@register_fusion
class Robust(Fusion):
    """fg answers where its confidence is above the threshold, else the most confident branch. Source: L2R2 3.3 [R].

    `fit` chooses the threshold with the highest accuracy; among equals the lowest, which trusts fg most, because held-out rows
    usually share the training backgrounds.

    Args:
        threshold: confidence in [0, 1]. 0 makes it fg alone, 1 makes it `max_confidence`.
    """

    name = "robust"

    def __init__(self, inputs: int = 2, classes: int = 0, threshold: float = 0.5) -> None:
        super().__init__(inputs, classes)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise L2R2Error(f'Fusion "robust" needs a threshold from 0 to 1, got {threshold}.')
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        sure = confidence(fg) > self.threshold
        return torch.where(sure[:, None], fg, most_confident(torch.cat([fg[None], context])))

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        surest = most_confident(torch.cat([fg[None], context]))
        order = confidence(fg).argsort()
        sorted_confidence = confidence(fg)[order]
        # as whole numbers sums are exact, so that equals are equal
        count = torch.ones_like(labels) if weights is None else (weights.double() / weights.sum() * 2**40).round().long()
        by_fg = ((fg.argmax(-1) == labels) * count)[order]
        by_surest = ((surest.argmax(-1) == labels) * count)[order]
        # right[i]: correct rows if the i least confident rows are left to the surest branch
        zero = torch.zeros(1, dtype=torch.long)
        right = torch.cat([zero, by_surest.cumsum(0)]) + by_fg.sum() - torch.cat([zero, by_fg.cumsum(0)])
        thresholds = torch.cat([sorted_confidence.new_zeros(1), sorted_confidence])
        # a threshold must lie between different confidences: of equal ones only the last can be the border
        border = torch.cat(
            [
                sorted_confidence != torch.cat([sorted_confidence.new_full((1,), -1.0), sorted_confidence[:-1]]),
                torch.ones(1, dtype=torch.bool),
            ]
        )
        best = torch.where(border, right, -1).argmax()  # the first of equals: the lowest threshold
        self.threshold.copy_(thresholds[best])

    @torch.jit.ignore
    def count(self) -> int:
        return 1

    @torch.jit.ignore
    def settings(self) -> dict[str, Any]:
        return {"threshold": round(self.threshold.item(), 6)}

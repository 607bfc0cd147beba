"""Fusions that compare or average unscaled logits; only `robust` has a parameter.

Source: L2R2 3.3 and B.3; `docs/method.md`, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from .base import Fusion, register_fusion


def confidence(logits: Tensor) -> Tensor:
    """Return the largest softmax probability per row, `[..., classes]` -> `[...]`.

    >>> import torch
    >>> confidence(torch.zeros(1, 4)).tolist()
    [0.25]
    """
    return logits.softmax(-1).amax(-1)


def most_confident(logits: Tensor) -> Tensor:
    """Select the logits of the most confident branch per row, `[K, B, classes]` -> `[B, classes]`.

    Ties go to the earlier branch.
    """
    best = confidence(logits).argmax(0)  # [B]
    return logits.gather(0, best[None, :, None].expand(1, -1, logits.shape[-1]))[0]


@register_fusion
class MaxConfidence(Fusion):
    """Use the branch with the highest confidence; ties go to fg. Source: L2R2 3.3 [R]."""

    name = "max_confidence"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Select the most confident branch per row; see `Fusion.combine`."""
        return most_confident(torch.cat([fg[None], context]))

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return the rows where fg has confidence 1 (ties go to fg); see `Fusion.decided`."""
        return confidence(fg) >= 1


@register_fusion
class Average(Fusion):
    """Average the logits of the branches. Source: L2R2 3.3 [R]."""

    name = "average"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Average the logits; see `Fusion.combine`."""
        return torch.cat([fg[None], context]).mean(0)


@register_fusion
class Robust(Fusion):
    """Use fg where its confidence is above a threshold, else the most confident branch. Source: L2R2 3.3 [R].

    `fit` sets the threshold with the highest accuracy. Ties go to the lowest, which favors fg, because held-out rows usually
    share the training backgrounds.

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.
        threshold: confidence in [0, 1]; 0 is fg alone, 1 is `max_confidence`.

    Raises:
        L2R2Error: when `threshold` is not a number in [0, 1].
    """

    name = "robust"

    def __init__(self, inputs: int = 2, classes: int = 0, threshold: float = 0.5) -> None:
        super().__init__(inputs, classes)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise L2R2Error(f'Fusion "robust" needs a threshold from 0 to 1, got {threshold}.')
        self.threshold: Tensor
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Select fg or the most confident branch per row; see `Fusion.combine`."""
        sure = confidence(fg) > self.threshold
        return torch.where(sure[:, None], fg, most_confident(torch.cat([fg[None], context])))

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return the rows where fg is above the threshold or has confidence 1 (ties go to fg); see `Fusion.decided`."""
        sure = confidence(fg)
        return (sure > self.threshold) | (sure >= 1)

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Set the threshold with the highest (weighted) accuracy; see `Fusion.fit`."""
        chosen = most_confident(torch.cat([fg[None], context]))
        order = confidence(fg).argsort()
        sorted_confidence = confidence(fg)[order]
        # integer sums are exact, so that ties are found
        count = torch.ones_like(labels) if weights is None else (weights.double() / weights.sum() * 2**40).round().long()
        by_fg = ((fg.argmax(-1) == labels) * count)[order]
        by_chosen = ((chosen.argmax(-1) == labels) * count)[order]
        # right[i]: correct rows if the i least confident rows go to the most confident branch
        zero = torch.zeros(1, dtype=torch.long)
        right = torch.cat([zero, by_chosen.cumsum(0)]) + by_fg.sum() - torch.cat([zero, by_fg.cumsum(0)])
        thresholds = torch.cat([sorted_confidence.new_zeros(1), sorted_confidence])
        # a threshold can only separate different confidences, so of equal ones only the last can be the border
        border = torch.cat(
            [
                sorted_confidence != torch.cat([sorted_confidence.new_full((1,), -1.0), sorted_confidence[:-1]]),
                torch.ones(1, dtype=torch.bool),
            ]
        )
        best = torch.where(border, right, -1).argmax()  # ties go to the first, the lowest threshold
        self.threshold.copy_(thresholds[best])

    @torch.jit.ignore
    def count(self) -> int:
        """Return 1, for the threshold."""
        return 1

    @torch.jit.ignore
    def settings(self) -> dict[str, Any]:
        """Return the threshold."""
        return {"threshold": round(self.threshold.item(), 6)}

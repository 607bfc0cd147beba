"""Fusions of temperature-scaled logits (L2R2 3.3 and B.3; `docs/method.md`, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Fusion, register_fusion
from .calibration import fit_class_temperatures, fit_temperature
from .confidence import confidence, most_confident


class Scaled(Fusion):
    """Base class of fusions of `z / T`, with one temperature per branch, or one per branch and class.

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.
        class_wise: fit one temperature per class. This can change the argmax of a branch; one temperature per branch cannot.
    """

    def __init__(self, inputs: int = 2, classes: int = 0, class_wise: bool = False) -> None:
        super().__init__(inputs, classes)
        self.class_wise = bool(class_wise)
        self.temperatures: Tensor
        self.register_buffer("temperatures", torch.ones(inputs, classes if class_wise else 1))  # fg first

    def scaled(self, fg: Tensor, context: Tensor) -> Tensor:
        """Return the scaled logits `[1 + K, B, classes]`, fg first."""
        return torch.cat([fg[None], context]) / self.temperatures[:, None].to(fg)

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit one temperature per branch, or one per branch and class; see `Fusion.fit`."""
        fit = fit_class_temperatures if self.class_wise else fit_temperature
        for row, logits in zip(self.temperatures, torch.cat([fg[None], context])):
            row.copy_(torch.as_tensor(fit(logits, labels, weights)))

    @torch.jit.ignore
    def count(self) -> int:
        """Return the number of temperatures."""
        return self.temperatures.numel()

    @torch.jit.ignore
    def chosen(self) -> dict[str, Any]:
        """Return `class_wise`."""
        return {"class_wise": self.class_wise}


@register_fusion
class MaxScaledConfidence(Scaled):
    """Use the branch with the highest confidence after temperature scaling. Source: L2R2 3.3 [R]."""

    name = "max_scaled_confidence"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Select the most confident branch per row; see `Fusion.combine`."""
        return most_confident(self.scaled(fg, context))

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return the rows where the scaled fg has confidence 1 (ties go to fg); see `Fusion.decided`."""
        return confidence(fg / self.temperatures[0].to(fg)) >= 1


@register_fusion
class ScaledAverage(Scaled):
    """Average the scaled logits. Source: L2R2 3.3 [R]."""

    name = "scaled_average"

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Average the scaled logits; see `Fusion.combine`."""
        return self.scaled(fg, context).mean(0)


@register_fusion
class ScaledWeightedAverage(Scaled):
    """Weighted average `a z_fg + (1 - a) z_context` of scaled logits, where z_context is the mean of the other branches.

    `fit` sets `a` to the value in 0, 0.01, ..., 1 with the highest accuracy; ties go to the largest, which favors fg. Source:
    L2R2 3.3 [R].
    """

    name = "scaled_weighted_average"

    def __init__(self, inputs: int = 2, classes: int = 0, class_wise: bool = False) -> None:
        super().__init__(inputs, classes, class_wise)
        self.weight: Tensor
        self.register_buffer("weight", torch.tensor(0.5))

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Return the weighted average of the scaled logits; see `Fusion.combine`."""
        z = self.scaled(fg, context)
        return self.weight.to(z) * z[0] + (1 - self.weight.to(z)) * z[1:].mean(0)

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return all rows if the weight of fg is 1, else none; see `Fusion.decided`."""
        return (self.weight >= 1).expand(len(fg))

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit the temperatures, then the weight `a`; see `Fusion.fit`."""
        super().fit(fg, context, labels, weights)
        z = self.scaled(fg, context)
        count = torch.ones(len(labels), dtype=torch.double) if weights is None else weights.double()
        grid = torch.linspace(1, 0, 101)
        right = [round(float((((a * z[0] + (1 - a) * z[1:].mean(0)).argmax(-1) == labels) * count).sum()), 9) for a in grid]
        self.weight.copy_(grid[right.index(max(right))])

    @torch.jit.ignore
    def count(self) -> int:
        """Return the number of temperatures plus one, for the weight `a`."""
        return self.temperatures.numel() + 1

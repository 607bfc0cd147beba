"""Fusions with learned weights on the logits of the branches, to be fitted on held-out rows.

Source: L2R2 3.3 and B.3; `docs/method.md`, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import L2R2Error
from .base import Fusion, register_fusion

SHRINK = 1e-3  # strength of the penalty that pulls weights toward 1, so that absent classes keep theirs
STEPS = 400


@register_fusion
class WeightedLogits(Fusion):
    """Weighted sum of logits, with one weight per branch and class, fitted by cross-entropy. Source: L2R2 B.3 [R].

    Before `fit` all weights are 1. Weights are never negative: a negative weight would help where held-out backgrounds mislead,
    but on usual backgrounds the prediction could then be a class that no branch predicts.
    """

    name = "weighted_logits"

    def __init__(self, inputs: int = 2, classes: int = 0) -> None:
        super().__init__(inputs, classes)
        self.weights: Tensor
        self.register_buffer("weights", torch.ones(inputs, classes))  # fg first

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Return the weighted sum of the logits; see `Fusion.combine`."""
        return (torch.cat([fg[None], context]) * self.weights[:, None].to(fg)).sum(0)

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit the weights with L-BFGS; see `Fusion.fit`."""
        z = torch.cat([fg[None], context]).double()
        with torch.enable_grad(), torch.inference_mode(False):
            z, labels = z.clone(), labels.clone()
            rows = torch.ones_like(z[0, :, 0]) if weights is None else weights.to(z).clone()
            fitted = torch.ones(self.weights.shape, dtype=torch.float64, requires_grad=True)
            solver = torch.optim.LBFGS([fitted], max_iter=200, line_search_fn="strong_wolfe")

            def loss() -> Tensor:
                solver.zero_grad()
                w = fitted.square()
                errors = functional.cross_entropy((z * w[:, None]).sum(0), labels, reduction="none")
                value = rows @ errors / rows.sum() + SHRINK * (w - 1).square().sum()
                value.backward()
                return value

            solver.step(loss)
        self.weights.copy_(fitted.detach().square())

    @torch.jit.ignore
    def count(self) -> int:
        """Return the number of weights, one per branch and class."""
        return self.weights.numel()


@register_fusion
class ConcatMLP(Fusion):
    """Shallow MLP on the concatenated logits, fitted by cross-entropy. Source: L2R2 B.3 [R].

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.
        hidden: width of the hidden layer.

    Raises:
        L2R2Error: when `hidden` is not an integer of at least 1.
    """

    name = "concat_mlp"
    needs_fit = True

    def __init__(self, inputs: int = 2, classes: int = 0, hidden: int = 64) -> None:
        super().__init__(inputs, classes)
        if not isinstance(hidden, int) or hidden < 1:
            raise L2R2Error(f'Fusion "concat_mlp" needs a hidden width of at least 1, got {hidden}.')
        self.hidden = hidden
        for name, shape in self._shapes().items():
            self.register_buffer(name, torch.zeros(shape))
        self.weight1: Tensor
        self.bias1: Tensor
        self.weight2: Tensor
        self.bias2: Tensor

    @torch.jit.ignore
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.inputs * self.classes
        return {
            "weight1": (self.hidden, width),
            "bias1": (self.hidden,),
            "weight2": (self.classes, self.hidden),
            "bias2": (self.classes,),
        }

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Apply the MLP; see `Fusion.combine`."""
        z = torch.cat([fg[None], context]).transpose(0, 1).flatten(1)  # [B, inputs * classes], fg first
        hidden = functional.linear(z, self.weight1.to(z), self.bias1.to(z)).relu()
        return functional.linear(hidden, self.weight2.to(z), self.bias2.to(z))

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Train the MLP with AdamW and a fixed seed; see `Fusion.fit`."""
        z = torch.cat([fg[None], context]).transpose(0, 1).flatten(1).float()
        with torch.enable_grad(), torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            z, labels = z.clone(), labels.clone()
            rows = torch.ones(len(z)) if weights is None else weights.to(z).clone()
            torch.default_generator.manual_seed(0)
            network = torch.nn.Sequential(
                torch.nn.Linear(z.shape[1], self.hidden), torch.nn.ReLU(), torch.nn.Linear(self.hidden, self.classes)
            )
            optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
            for _ in range(STEPS):
                optimizer.zero_grad()
                (rows @ functional.cross_entropy(network(z), labels, reduction="none") / rows.sum()).backward()
                optimizer.step()
        for name, value in zip(self._shapes(), network.parameters()):
            getattr(self, name).copy_(value.detach())

    @torch.jit.ignore
    def count(self) -> int:
        """Return the number of weights and biases."""
        return sum(buffer.numel() for buffer in self.buffers(recurse=False))

    @torch.jit.ignore
    def chosen(self) -> dict[str, Any]:
        """Return the hidden width."""
        return {"hidden": self.hidden}

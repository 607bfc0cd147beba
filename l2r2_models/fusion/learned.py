"""Fusions with learned weights on the branches' logits (L2R2 3.3 and B.3). Fit them on held-out rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import L2R2Error
from .base import Fusion, register_fusion

SHRINK = 1e-3  # pull of the weights towards 1, so that classes that do not occur keep their weight
STEPS = 400


@register_fusion
class WeightedLogits(Fusion):
    """Sum of the branches' logits, each class of each branch with its own weight, by cross-entropy. Source: L2R2 B.3 [R].

    With weights of 1, as before `fit`, it is the sum. No weight is negative: where held-out backgrounds mislead, a negative one
    would pay, and on usual backgrounds the prediction could then be a class that neither branch predicts.
    """

    name = "weighted_logits"

    def __init__(self, inputs: int = 2, classes: int = 0) -> None:
        super().__init__(inputs, classes)
        self.weights: Tensor
        self.register_buffer("weights", torch.ones(inputs, classes))  # fg first

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        return (torch.cat([fg[None], context]) * self.weights[:, None].to(fg)).sum(0)

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
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

            solver.step(loss)  # type: ignore[arg-type]
        self.weights.copy_(fitted.detach().square())

    @torch.jit.ignore
    def count(self) -> int:
        return self.weights.numel()


@register_fusion
class ConcatMLP(Fusion):
    """A shallow MLP on the concatenated logits, by cross-entropy. Source: L2R2 B.3 [R].

    Args:
        hidden: width of its one hidden layer.
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
        z = torch.cat([fg[None], context]).transpose(0, 1).flatten(1)  # [B, inputs * classes], fg first
        hidden = functional.linear(z, self.weight1.to(z), self.bias1.to(z)).relu()
        return functional.linear(hidden, self.weight2.to(z), self.bias2.to(z))

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
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
        return sum(buffer.numel() for buffer in self.buffers(recurse=False))

    @torch.jit.ignore
    def chosen(self) -> dict[str, Any]:
        return {"hidden": self.hidden}

"""What every fusion is: a module that turns the branches' logits into one set of logits, and its registry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import L2R2Error

FUSIONS: dict[str, type[Fusion]] = {}


class Fusion(nn.Module):
    """Combines the logits of the fg branch with those of the context branches (full and/or bg).

    A subclass implements `combine`, and `fit` where it has numbers to fit. Its numbers, given or fitted, are buffers: they
    travel in the checkpoint and no training step moves them. Rows without a box never reach `combine`'s result: they return
    the first context branch's logits exactly (L2R2 3.1, METHOD.md 2).

    Args:
        inputs: number of branches, fg among them.
        classes: number of classes.
    """

    name: str = ""
    needs_fit: bool = False  # without fitted numbers its answers mean nothing

    def __init__(self, inputs: int = 2, classes: int = 0) -> None:
        super().__init__()
        self.inputs, self.classes = inputs, classes

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Fuse rows that have a box.

        Args:
            fg: `[B, classes]` logits of the fg branch.
            context: `[K, B, classes]` logits of the other branches, full first where there is one.

        Returns:
            `[B, classes]` logits or log-probabilities.
        """
        raise TypeError(f"{type(self).__name__} must define combine(fg, context)")

    def weigh(self, fg: Tensor, context: Tensor, objectness: Tensor) -> Tensor:
        """`combine` where the boxes' scores `[B]` in [0, 1] are known; most fusions do not ask for them."""
        return self.combine(fg, context)

    def forward(self, fg: Tensor, context: Tensor, has_fg: Tensor | None = None, objectness: Tensor | None = None) -> Tensor:
        """`combine` or `weigh`, with the fallback: where `has_fg` (`[B]` bool) is False the row is `context[0]`, bit for bit."""
        fused = self.combine(fg, context) if objectness is None else self.weigh(fg, context, objectness)
        if has_fg is None:
            return fused
        return torch.where(has_fg[:, None], fused, context[0])

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor) -> None:
        """Fit the numbers on held-out logits of rows that have a box; nothing to do where there are none.

        Args:
            fg: `[N, classes]`, context: `[K, N, classes]`, labels: `[N]` int64.
        """

    @torch.jit.ignore
    def count(self) -> int:
        """How many numbers `fit` chooses."""
        return 0

    @torch.jit.ignore
    def config(self) -> dict[str, Any]:
        """The name and the settings, enough for `create_fusion` to build it again; fitted numbers are in the state dict."""
        return {"name": self.name}


def fuse_branches(
    fusion: Fusion, logits: Mapping[str, Tensor], has_fg: Tensor | None = None, objectness: Tensor | None = None
) -> Tensor:
    """Fuse the logits `[B, classes]` of whatever branches there are; THE rule of which branch answers where.

    Rows without an object are the full branch's; without a full branch they are fg's, which saw the whole image there. With
    fg or the context missing, nothing is fused: the branch that there is answers.
    `objectness` (`[B]`, the boxes' scores) is for fusions that weigh it; without it every box counts as sure.
    """
    context = [logits[b] for b in ("full", "bg") if b in logits]
    if "fg" not in logits or not context:
        return context[0] if context else logits["fg"]
    if "full" in logits:
        return fusion(logits["fg"], torch.stack(context), has_fg, objectness)
    fused = fusion(logits["fg"], torch.stack(context), None, objectness)
    return fused if has_fg is None else torch.where(has_fg[:, None], fused, logits["fg"])


F = TypeVar("F", bound=type[Fusion])


def register_fusion(cls: F) -> F:
    """Make a fusion class known by its `name`."""
    FUSIONS[cls.name] = cls
    return cls


def create_fusion(config: str | Mapping[str, Any], inputs: int = 2, classes: int = 0) -> Fusion:
    """Build a fusion from its name, or from `{"name": ..., <its arguments>}`, for so many branches and classes.

    Raises:
        L2R2Error: an unknown name, an argument that the fusion does not take, or a value out of range.
    """
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    name = arguments.pop("name", None)
    if name not in FUSIONS:
        raise L2R2Error(f'Unknown fusion "{name}"; choose from {", ".join(sorted(FUSIONS))}.')
    known = [p for p in inspect.signature(FUSIONS[name].__init__).parameters if p not in ("self", "inputs", "classes")]
    if unknown := set(arguments) - set(known):
        takes = ", ".join(known) if known else "no arguments"
        raise L2R2Error(f'Fusion "{name}" does not take {", ".join(sorted(unknown))}; it takes {takes}.')
    return FUSIONS[name](inputs=inputs, classes=classes, **arguments)

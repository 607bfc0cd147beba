"""What every fusion is: a module that turns the branches' logits into one set of logits, and its registry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import L2R2Error

FUSIONS: dict[str, type[Fusion]] = {}
INPUTS = ("fg", "full", "bg")  # in the order in which a fusion takes them


class Fusion(nn.Module):
    """Combines the logits of the fg branch with those of the context branches (full and/or bg).

    A subclass implements `combine`, and `fit` where it has numbers to fit. Its numbers, given or fitted, are buffers: they
    travel in the checkpoint and no training step moves them. Which branch answers for rows without an object is not a fusion's
    business, see `fuse_branches`.

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.

    Attributes:
        over: names of the branches that are fused; None for all that a model has. See `create_fusion`.
        batch: a `two_worlds` that fuses the images of a place together, see `fuse_groups`; None before it is fitted.
    """

    name: str = ""
    needs_fit: bool = False  # without fitted numbers its answers mean nothing

    def __init__(self, inputs: int = 2, classes: int = 0) -> None:
        super().__init__()
        self.inputs, self.classes = inputs, classes
        self.over: tuple[str, ...] | None = None
        self.batch: Any = None

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

    def forward(self, fg: Tensor, context: Tensor, objectness: Tensor | None = None) -> Tensor:
        """`combine`, or `weigh` where the boxes' scores are given."""
        return self.combine(fg, context) if objectness is None else self.weigh(fg, context, objectness)

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit the numbers on held-out logits of rows that have a box; nothing to do where there are none.

        Args:
            fg: `[N, classes]`, context: `[K, N, classes]`, labels: `[N]` int64.
            weights: `[N]`, how many observations each row stands for; None: one.
            away: `[N]` bool, which rows have backgrounds that say nothing of the class; None where nobody knows.
        """

    @torch.jit.ignore
    def set_prior(self, counts: Tensor) -> None:
        """Tell how many rows of each class `[classes]` the branches were trained on; most fusions do not ask for it."""

    @torch.jit.ignore
    def count(self) -> int:
        """How many numbers `fit` chooses."""
        return 0

    @torch.jit.ignore
    def config(self) -> dict[str, Any]:
        """The name and the settings, enough for `create_fusion` to build it again; fitted numbers are in the state dict."""
        batch = {} if self.batch is None else {"batch": True}
        return {"name": self.name, **self.settings(), **({} if self.over is None else {"inputs": list(self.over)}), **batch}

    @torch.jit.ignore
    def settings(self) -> dict[str, Any]:
        """The arguments that build a subclass again, with those numbers that `fit` chooses."""
        return self.chosen()

    @torch.jit.ignore
    def chosen(self) -> dict[str, Any]:
        """Those arguments that no `fit` changes."""
        return {}

    @torch.jit.ignore
    def unfitted(self) -> dict[str, Any]:
        """The config without anything that was fitted: what other classes start from."""
        return {"name": self.name, **self.chosen(), **({} if self.over is None else {"inputs": list(self.over)})}


def fused_logits(fusion: Fusion, logits: Mapping[str, Tensor]) -> tuple[str, Tensor, Tensor] | None:
    """The name and the logits `[B, classes]` of the branch that a fusion takes first, fg where it is one of them, and those of
    the others `[K, B, classes]`; None where fewer than two of its branches are there."""
    used = [b for b in INPUTS if b in logits and (fusion.over is None or b in fusion.over)]
    return (used[0], logits[used[0]], torch.stack([logits[b] for b in used[1:]])) if len(used) > 1 else None


def fall_back(answer: Tensor, full: Tensor, has_fg: Tensor) -> Tensor:
    """`answer` `[B, classes]` where an object was found (`has_fg` `[B]` bool), else the full branch's logits (L2R2 3.1)."""
    return torch.where(has_fg[:, None], answer, full)


def with_fallback(logits: Mapping[str, Tensor], has_fg: Tensor) -> dict[str, Tensor]:
    """The logits of each branch as it answers: without an object the full branch answers for fg and bg, where there is one."""
    full = logits.get("full")
    return {b: z if b == "full" or full is None else fall_back(z, full, has_fg) for b, z in logits.items()}


def fuse_branches(
    fusion: Fusion, logits: Mapping[str, Tensor], has_fg: Tensor | None = None, objectness: Tensor | None = None
) -> Tensor:
    """Fuse the logits `[B, classes]` of whatever branches there are; the rule of which branch answers where.

    Rows without an object are the full branch's, also where it is not one of the branches that are fused; without a full branch
    they are fg's, which saw the whole image there. With fewer than two of the branches to fuse, nothing is fused: the first of
    full, bg and fg answers. `objectness` (`[B]`, the boxes' scores) is for fusions that weigh it; without it every box counts as
    sure.
    """
    found = fused_logits(fusion, logits)
    if found is None:
        return next(logits[b] for b in ("full", "bg", "fg") if b in logits)
    lead, first, others = found
    fused = fusion(first, others, objectness if lead == "fg" else None)
    return fused if has_fg is None else fall_back(fused, logits.get("full", first), has_fg)


F = TypeVar("F", bound=type[Fusion])


def register_fusion(cls: F) -> F:
    """Make a fusion class known by its `name`."""
    FUSIONS[cls.name] = cls
    return cls


def create_fusion(config: str | Mapping[str, Any], branches: int | Sequence[str] = 2, classes: int = 0) -> Fusion:
    """Build a fusion from its name, or from `{"name": ..., "inputs": ..., <its arguments>}`.

    Args:
        config: `inputs` are the branches that are fused, by default all; the paper's other standard is `["fg", "bg"]` of a model
            with three branches, whose full branch then answers only where no object is found (L2R2 3.3). `batch` true gives it
            a batch rule, see `fuse_groups`; its numbers are in the state dict.
        branches: those of the model, or how many it has.
        classes: number of classes.

    Raises:
        L2R2Error: an unknown name, an argument that the fusion does not take, a value out of range, or inputs that are not two
            or more branches of the model.
    """
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    name, inputs, batch = arguments.pop("name", None), arguments.pop("inputs", None), arguments.pop("batch", False)
    count = branches if isinstance(branches, int) else len(branches)
    if inputs is not None:
        has = INPUTS if isinstance(branches, int) else tuple(branches)
        if not isinstance(inputs, (list, tuple)) or len(inputs) < 2 or len({*inputs}) < len(inputs) or not {*inputs} <= {*has}:
            raise L2R2Error(f"The inputs of a fusion are two or more of the branches {', '.join(has)}, got {inputs!r}.")
        count = len(inputs)
    if name not in FUSIONS:
        raise L2R2Error(f'Unknown fusion "{name}"; choose from {", ".join(sorted(FUSIONS))}.')
    known = [p for p in inspect.signature(FUSIONS[name].__init__).parameters if p not in ("self", "inputs", "classes")]
    if unknown := set(arguments) - set(known):
        takes = ", ".join(known) if known else "no arguments"
        raise L2R2Error(f'Fusion "{name}" does not take {", ".join(sorted(unknown))}; it takes {takes}.')
    fusion = FUSIONS[name](inputs=count, classes=classes, **arguments)
    fusion.over = None if inputs is None else tuple(b for b in INPUTS if b in inputs)
    if not isinstance(batch, bool):
        raise L2R2Error(f'"batch" of a fusion is true or false, got {batch!r}.')
    fusion.batch = FUSIONS["two_worlds"](inputs=count, classes=classes) if batch else None
    return fusion

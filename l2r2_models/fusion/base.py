"""The base class of all fusions, their registry, and the rule for rows without an object."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import L2R2Error

FUSIONS: dict[str, type[Fusion]] = {}
INPUTS = ("fg", "full", "bg")  # order in which a fusion takes the branches


class Fusion(nn.Module):
    """Combine the logits of the fg branch with those of the context branches (full, bg or both).

    A subclass implements `combine`, and `fit` if it has parameters to fit. Its parameters, given or fitted, are buffers: they
    are saved in the checkpoint and are not updated by training. Rows without an object are handled by `fuse_branches`.

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.

    Attributes:
        over: names of the branches that are fused; None for all branches of the model. See `create_fusion`.
        batch: a `two_worlds` fusion for images taken at the same place, see `fuse_groups`; None until it is fitted.
    """

    name: str = ""
    needs_fit: bool = False  # must be fitted before use

    def __init__(self, inputs: int = 2, classes: int = 0) -> None:
        super().__init__()
        self.inputs, self.classes = inputs, classes
        self.over: tuple[str, ...] | None = None
        self.batch: Any = None

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Fuse rows that have a box.

        Args:
            fg: `[B, classes]` logits of the fg branch.
            context: `[K, B, classes]` logits of the other branches, full first if present.

        Returns:
            `[B, classes]` logits or log-probabilities.
        """
        raise TypeError(f"{type(self).__name__} must define combine(fg, context)")

    def weigh(self, fg: Tensor, context: Tensor, objectness: Tensor) -> Tensor:
        """Fuse as `combine` does, given the box scores `[B]` in [0, 1]; most fusions ignore them."""
        return self.combine(fg, context)

    def forward(self, fg: Tensor, context: Tensor, objectness: Tensor | None = None) -> Tensor:
        """Fuse with `weigh` if box scores are given, else with `combine`."""
        return self.combine(fg, context) if objectness is None else self.weigh(fg, context, objectness)

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return `[B]` bool, the rows whose fused logits do not depend on the other branches; in most fusions, none.

        A cascade does not run the other branches on these rows (`docs/method.md`, section 4).

        Args:
            fg: `[B, classes]` logits of the fg branch.
            objectness: `[B]` box scores in [0, 1].
        """
        return torch.zeros(len(fg), dtype=torch.bool, device=fg.device)

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit the parameters on held-out logits of rows that have a box; a no-op for fusions without parameters.

        Args:
            fg: `[N, classes]` logits of the fg branch.
            context: `[K, N, classes]` logits of the other branches.
            labels: `[N]` int64 class indices.
            weights: `[N]` number of observations per row; None for one each.
            away: `[N]` bool, True for rows whose background is unrelated to the class; None if unknown.
        """

    @torch.jit.ignore
    def set_prior(self, counts: Tensor) -> None:
        """Set the number of training rows per class `[classes]`; most fusions ignore it."""

    @torch.jit.ignore
    def count(self) -> int:
        """Return the number of parameters that `fit` sets."""
        return 0

    @torch.jit.ignore
    def config(self) -> dict[str, Any]:
        """Return the config from which `create_fusion` rebuilds this fusion; fitted buffers are in the state dict."""
        batch = {} if self.batch is None else {"batch": True}
        return {"name": self.name, **self.settings(), **({} if self.over is None else {"inputs": list(self.over)}), **batch}

    @torch.jit.ignore
    def settings(self) -> dict[str, Any]:
        """Return all constructor arguments, including those that `fit` sets."""
        chosen: dict[str, Any] = self.chosen()
        return chosen

    @torch.jit.ignore
    def chosen(self) -> dict[str, Any]:
        """Return the constructor arguments that `fit` does not change."""
        return {}

    @torch.jit.ignore
    def unfitted(self) -> dict[str, Any]:
        """Return the config without fitted values, e.g. to start over with other classes."""
        return {"name": self.name, **self.chosen(), **({} if self.over is None else {"inputs": list(self.over)})}


def fused_logits(fusion: Fusion, logits: Mapping[str, Tensor]) -> tuple[str, Tensor, Tensor] | None:
    """Select the logits that a fusion takes as its inputs.

    Args:
        fusion: its `over` names the branches to use.
        logits: `[B, classes]` by branch.

    Returns:
        The name of the leading branch (fg if it is used), its logits `[B, classes]`, and those of the other branches
        `[K, B, classes]`; None if fewer than two of the branches are present.
    """
    used = [b for b in INPUTS if b in logits and (fusion.over is None or b in fusion.over)]
    return (used[0], logits[used[0]], torch.stack([logits[b] for b in used[1:]])) if len(used) > 1 else None


def fall_back(answer: Tensor, full: Tensor, has_fg: Tensor) -> Tensor:
    """Replace logits by those of the full branch in rows without an object (L2R2 3.1; `docs/method.md`, section 2).

    Args:
        answer: `[B, classes]` logits for rows with an object.
        full: `[B, classes]` logits of the full branch.
        has_fg: `[B]` bool, True where an object was found.

    >>> import torch
    >>> fall_back(torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([True, False])).tolist()
    [[1.0], [0.0]]
    """
    return torch.where(has_fg[:, None], answer, full)


def with_fallback(logits: Mapping[str, Tensor], has_fg: Tensor) -> dict[str, Tensor]:
    """Return the logits of each branch, with those of the full branch, if any, for fg and bg in rows without an object."""
    full = logits.get("full")
    return {b: z if b == "full" or full is None else fall_back(z, full, has_fg) for b, z in logits.items()}


def fuse_branches(
    fusion: Fusion, logits: Mapping[str, Tensor], has_fg: Tensor | None = None, objectness: Tensor | None = None
) -> Tensor:
    """Fuse the logits of the branches that are present, with the fallback for rows without an object.

    Rows without an object take the logits of the full branch, even if the fusion does not use it. Without a full branch they
    take those of the leading branch (fg if it is used), which saw the whole image there. With fewer than two branches to fuse,
    the logits of the first of full, bg and fg are returned. See `docs/method.md`, section 2.

    Args:
        fusion: the fusion to apply.
        logits: `[B, classes]` by branch.
        has_fg: `[B]` bool, True where an object was found; None if it was found in every row.
        objectness: `[B]` box scores in [0, 1], for fusions that use them; None for 1 everywhere.

    Returns:
        `[B, classes]` logits or log-probabilities.
    """
    found = fused_logits(fusion, logits)
    if found is None:
        return next(logits[b] for b in ("full", "bg", "fg") if b in logits)
    lead, first, others = found
    fused = fusion(first, others, objectness if lead == "fg" else None)
    return fused if has_fg is None else fall_back(fused, logits.get("full", first), has_fg)


F = TypeVar("F", bound=type[Fusion])


def register_fusion(cls: F) -> F:
    """Register a fusion class under its `name`."""
    FUSIONS[cls.name] = cls
    return cls


def create_fusion(config: str | Mapping[str, Any], branches: int | Sequence[str] = 2, classes: int = 0) -> Fusion:
    """Build a fusion from its name, or from `{"name": ..., "inputs": ..., <its arguments>}`.

    Args:
        config: name, or mapping. `inputs` names the branches to fuse (default: all). The paper also uses `["fg", "bg"]` of a
            three-branch model, whose full branch is then only the fallback (L2R2 3.3). `batch: true` adds a batch rule, see
            `fuse_groups`; its parameters are in the state dict.
        branches: names of the model's branches, or their number.
        classes: number of classes.

    Raises:
        L2R2Error: when the name is unknown, the fusion does not take an argument, a value is out of range, or `inputs` are not
            two or more branches of the model.

    >>> create_fusion({"name": "robust", "threshold": 0.25}, ("fg", "full")).config()
    {'name': 'robust', 'threshold': 0.25}
    """
    arguments = {"name": config} if isinstance(config, str) else dict(config)
    name, inputs, batch = arguments.pop("name", None), arguments.pop("inputs", None), arguments.pop("batch", False)
    count = branches if isinstance(branches, int) else len(branches)
    if inputs is not None:
        has = INPUTS if isinstance(branches, int) else tuple(branches)
        if not isinstance(inputs, (list, tuple)) or len(inputs) < 2 or len({*inputs}) < len(inputs) or not {*inputs} <= {*has}:
            raise L2R2Error(f"The inputs of a fusion must be two or more of the branches {', '.join(has)}, got {inputs!r}.")
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
        raise L2R2Error(f'"batch" of a fusion must be true or false, got {batch!r}.')
    fusion.batch = FUSIONS["two_worlds"](inputs=count, classes=classes) if batch else None
    return fusion

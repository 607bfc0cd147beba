"""Cascade: the fg branch first, and the others only on the rows that it does not decide (`docs/method.md`, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import L2R2Error
from ..fusion.confidence import confidence
from .l2r2 import L2R2


@dataclass(frozen=True)
class Cascade:
    """The rows that the fg branch decides alone.

    Attributes:
        loss: accuracy in percentage points that may be lost. With 0, fg decides the rows whose fused logits no other branch
            can change; else those where it is confident enough, and its prediction replaces the fused one.
        threshold: fg confidence from which fg decides, fitted for the loss; None with a loss of 0.
    """

    loss: float
    threshold: float | None = None

    def decided(self, model: L2R2, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return `[B]` bool, the rows that fg decides.

        Args:
            model: the model that the logits are of.
            fg: `[B, classes]` logits of the fg branch.
            objectness: `[B]` box scores in [0, 1].

        >>> Cascade(0.2, 0.9).decided(None, torch.tensor([[5.0, 0.0], [1.0, 0.0]]), torch.ones(2)).tolist()
        [True, False]
        """
        if self.threshold is not None:
            return confidence(fg) >= self.threshold
        decided: Tensor = model.fusion.decided(fg, objectness)
        return decided & _uses_fg(model)

    def fused(self, fused: Tensor, fg: Tensor, decided: Tensor) -> Tensor:
        """Return the fused logits `[B, classes]`, with those of fg in the decided rows if the threshold was fitted."""
        return fused if self.threshold is None else torch.where(decided[:, None], fg, fused)


def check_cascade(model: L2R2) -> None:
    """Check that the branches of a model can run one after another.

    Raises:
        L2R2Error: when they cannot.
    """
    if not has_own_views(model) or not {"full", "fg"} <= set(model.branches):
        raise L2R2Error("A cascade needs a full branch, and an fg branch whose view is cut from the image.")


def has_own_views(model: L2R2) -> bool:
    """Return whether each branch has its own views; an fg that is masked or found inside the network shares those of full."""
    return not model.takes_mask and not model.finds_object


def can_decide(model: L2R2, device: torch.device) -> bool:
    """Return whether an fg branch with confidence 1 decides the fused logits."""
    certain = torch.tensor([[1e4] + [0.0] * (model.num_classes - 1)], device=device)
    return bool(Cascade(0.0).decided(model, certain, torch.ones(1, device=device)).all())


def _uses_fg(model: L2R2) -> bool:
    return model.fusion.over is None or "fg" in model.fusion.over

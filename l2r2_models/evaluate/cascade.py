"""Fit the confidence from which the fg branch decides alone, for a stated loss of accuracy (`docs/method.md`, section 4)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from ..fusion.confidence import confidence
from ..models.cascade import check_cascade
from ..models.l2r2 import L2R2
from .fuse import kinds_of
from .logits import BranchLogits
from .metrics import row_weights


@dataclass(frozen=True)
class CascadeFit:
    """A confidence threshold, and its effect on the held-out rows that it was fitted on.

    Attributes:
        loss: stated loss of accuracy in percentage points.
        threshold: fg decides rows with at least this confidence.
        skipped: fraction of the rows that fg decides, by kind (`plain`, `swapped`).
        lost: loss of accuracy in percentage points by kind; negative if the cascade is more accurate.
    """

    loss: float
    threshold: float
    skipped: dict[str, float]
    lost: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def check_request(model: L2R2, loss: float) -> None:
    """Check that a cascade can be fitted, before logits are computed.

    Raises:
        L2R2Error: when the loss is out of range, or the branches of the model cannot run one after another.
    """
    if not 0 < loss < 100:
        raise L2R2Error(f"--cascade is fitted for a loss above 0 and below 100 percentage points, got {loss:g}; 0 needs no fit.")
    check_cascade(model)


def fit_cascade(fused: Tensor, data: BranchLogits, loss: float, metric: str = "accuracy") -> CascadeFit:
    """Fit the lowest threshold at which fg, deciding alone, loses at most the stated accuracy on each kind of rows.

    No higher threshold may lose more either, so that the threshold does not rest on a few rows where fg happens to be right.

    Args:
        fused: `[N, classes]` fused logits of the rows.
        data: branch logits of held-out rows of a model with an fg branch.
        loss: accuracy to lose, in percentage points above 0.
        metric: `accuracy` or `macro_accuracy`.

    Raises:
        L2R2Error: when no threshold keeps to the loss.
    """
    fg, found, labels = data.logits["fg"], data.has_fg, data.labels
    sure = confidence(fg)
    values, number = sure[found].unique(return_inverse=True)  # ascending
    kinds = kinds_of(data)
    loses = (fused.argmax(-1) == labels).double() - (fg.argmax(-1) == labels).double()
    lost: dict[str, Tensor] = {}  # by threshold, the highest first
    for kind, rows in kinds.items():
        weights = torch.zeros(len(labels), dtype=torch.double)
        weights[rows] = row_weights(labels[rows], metric) / int(rows.sum())
        by_value = torch.zeros(len(values), dtype=torch.double).index_add(0, number, (100 * weights * loses)[found])
        lost[kind] = by_value.flip(0).cumsum(0)
    keeps = torch.stack([by_threshold <= loss + 1e-9 for by_threshold in lost.values()]).all(0)
    count = int(keeps.long().cumprod(0).sum())
    if not count:
        none = f"none of these {len(labels)} rows"
        raise L2R2Error(f"fg decides {none} without losing more than {loss:g} points; use a higher --cascade.")
    # halfway to the next lower confidence, so that rounding does not move a row to the other side
    threshold = float(values[-count] if count == len(values) else (values[-count] + values[-count - 1]) / 2)
    decided = found & (sure >= threshold)
    skipped = {kind: float(decided[rows].double().mean()) for kind, rows in kinds.items()}
    return CascadeFit(loss, threshold, skipped, {kind: float(by[count - 1]) for kind, by in lost.items()})

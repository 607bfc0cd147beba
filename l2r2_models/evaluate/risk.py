"""Selective prediction: the error rate among the most confident predictions, and the confidence below which to abstain.

Source: Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks" (NeurIPS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error


@dataclass(frozen=True)
class Abstention:
    """A confidence threshold, and its effect on the held-out images that it was fitted on.

    Attributes:
        risk: stated error rate among the predictions that are made.
        threshold: predictions with a lower confidence are withheld.
        coverage: fraction of the images with a prediction.
        reached: error rate among these.
        images: number of held-out images.
    """

    risk: float
    threshold: float
    coverage: float
    reached: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def risk_coverage(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the risk-coverage curve: one point per distinct confidence, the highest first.

    Args:
        confidence: `[N]`.
        right: `[N]` bool, whether the prediction is correct.

    Returns:
        The threshold, the number of predictions with at least this confidence, and the number of errors among them.

    >>> [v.tolist() for v in risk_coverage(torch.tensor([0.5, 0.9, 0.5]), torch.tensor([True, True, False]))[1:]]
    [[1, 3], [0, 1]]
    """
    values, counts = confidence.unique(return_counts=True)  # ascending
    place = torch.searchsorted(values, confidence)
    wrong = torch.zeros_like(counts).index_add(0, place, (~right).long())
    return values.flip(0), counts.flip(0).cumsum(0), wrong.flip(0).cumsum(0)


def risks_at(logits: Tensor, labels: Tensor, shares: Sequence[float]) -> list[float]:
    """Return the error rate of the most confident predictions, for each share of them; equally confident ones stay together.

    Args:
        logits: `[N, classes]`.
        labels: `[N]` class indices.
        shares: fractions of the predictions, above 0 and up to 1.

    >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    >>> risks_at(logits, torch.tensor([0, 1, 1, 1]), (0.25, 0.5, 1.0))
    [0.0, 0.5, 0.5]
    """
    sure, predicted = logits.softmax(-1).max(-1)
    _, counts, errors = risk_coverage(sure, predicted == labels)
    wanted = torch.tensor([share * len(labels) for share in shares], dtype=torch.float64)
    places = torch.searchsorted(counts.double(), wanted - 1e-9).clamp(max=len(counts) - 1)
    found: list[float] = (errors.double() / counts)[places].tolist()
    return found


def fit_abstention(logits: Tensor, labels: Tensor, risk: float) -> Abstention:
    """Fit the lowest threshold whose error rate, with one more error added, is at most the stated risk.

    The added error keeps the threshold from resting on a few correct images: without an error, a risk of 5 % takes 19 images.

    Args:
        logits: `[N, classes]` of held-out images.
        labels: `[N]` class indices.
        risk: error rate to reach, in (0, 1).

    Raises:
        L2R2Error: when the risk is out of range, or no threshold reaches it.
    """
    if not 0 < risk < 1:
        raise L2R2Error(f"--abstain-risk is an error rate between 0 and 1, got {risk:g}.")
    sure, predicted = logits.softmax(-1).max(-1)
    thresholds, counts, errors = risk_coverage(sure, predicted == labels)
    fits = ((errors + 1) / (counts + 1) <= risk).nonzero()[:, 0]
    if not len(fits):
        best = float(((errors + 1) / (counts + 1)).min())
        raise L2R2Error(
            f"No confidence threshold reaches a risk of {risk:g} on these {len(labels)} images; the lowest is {best:.3f}. "
            "Use a higher --abstain-risk, or more held-out images."
        )
    last = int(fits[-1])
    accepted, wrong = int(counts[last]), int(errors[last])
    return Abstention(risk, float(thresholds[last]), accepted / len(labels), wrong / accepted, len(labels))

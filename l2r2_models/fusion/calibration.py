"""Temperature scaling and calibration error (`docs/method.md`, sections 4 and 9)."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = (0.05, 20.0)  # of a temperature, which would diverge for a branch that is never correct
WRONG = 3.0  # pseudo-observations of unknown class: n rows without an error only show that the error rate is below 3 / n
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.4, 1.7, 2.0)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Compute the expected calibration error (ECE), in [0, 1].

    This is the mean absolute gap between confidence and accuracy over equal-width confidence bins, weighted by the rows per bin.
    Source: Guo et al. 2017, with 15 bins.

    Args:
        logits: `[N, classes]`.
        labels: `[N]` int64 class indices.
        bins: number of bins.

    >>> import torch
    >>> expected_calibration_error(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    0.0
    """
    sure, answer = logits.softmax(-1).max(-1)
    right = (answer == labels).to(sure)
    place = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=sure.dtype).index_add(0, place, sure - right)
    return float(gaps.abs().sum() / max(len(labels), 1))


def fit_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Fit the temperature T that minimizes the cross-entropy of `logits / T`, within `LIMITS`, with `WRONG` pseudo-observations.

    If every held-out row is correct, the likelihood alone drives T to 0. The pseudo-observations, copies of the rows with an
    unknown class, keep the confidence below what so few rows can support (the rule of three; Platt 1999 smooths the targets in
    the same way). The loss is convex in 1/T, so the root of its slope is found by bisection, which is deterministic.

    Args:
        logits: `[N, classes]`.
        labels: `[N]` int64 class indices.
        weights: `[N]` number of observations per row; None for one each.
    """
    z = logits.double()
    w = torch.ones(len(z), dtype=z.dtype) if weights is None else weights.to(z)
    unknown = WRONG / (float(w.sum()) + WRONG)
    target = (1 - unknown) * z.gather(1, labels[:, None])[:, 0] + unknown * z.mean(1)

    def slope(beta: float) -> float:
        return float(w @ (((beta * z).softmax(-1) * z).sum(-1) - target))

    low, high = 1 / LIMITS[1], 1 / LIMITS[0]
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def fit_class_temperatures(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Fit one temperature per class, `[classes]`.

    Starts from the global temperature and searches a grid of factors greedily, class by class. A change is kept if it lowers the
    calibration error and the accuracy stays at or above that of the unscaled logits.

    Args:
        logits: `[N, classes]`.
        labels: `[N]` int64 class indices.
        weights: `[N]` number of observations per row, used for the global temperature only; None for one each.
    """
    temperatures = torch.full((logits.shape[1],), fit_temperature(logits, labels, weights), dtype=logits.dtype)
    must = int((logits.argmax(-1) == labels).sum())
    best = expected_calibration_error(logits / temperatures, labels)
    for k in range(logits.shape[1]):
        start = temperatures[k].item()
        for factor in FACTORS:
            trial = temperatures.clone()
            trial[k] = min(max(start * factor, LIMITS[0]), LIMITS[1])
            scaled = logits / trial
            error = expected_calibration_error(scaled, labels)
            if error < best and int((scaled.argmax(-1) == labels).sum()) >= must:
                best, temperatures = error, trial
    return temperatures

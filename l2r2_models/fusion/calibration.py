"""Temperatures: how sure a branch says it is, brought in line with how often it is right (`docs/method.md`, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = (0.05, 20.0)  # of a temperature; a branch that is never right would go to infinity
WRONG = 3.0  # rows of unknown class that are added: n rows without an error are no proof of an error rate under 3 / n
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.4, 1.7, 2.0)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence, weighted by their rows; in [0, 1].

    Args:
        logits: `[N, classes]`, labels: `[N]`. Source: Guo et al. 2017 with 15 bins.
    """
    sure, answer = logits.softmax(-1).max(-1)
    right = (answer == labels).to(sure)
    place = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=sure.dtype).index_add(0, place, sure - right)
    return float(gaps.abs().sum() / max(len(labels), 1))


def fit_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """The temperature T that minimizes the cross-entropy of `logits / T`, within `LIMITS`, with `WRONG` pseudo-observations.

    Where every held-out row is right, the likelihood alone sends T to 0. The pseudo-observations, rows like the others whose
    class is unknown, keep the confidence below what so few rows can show (the rule of three; Platt 1999 smooths his targets
    likewise). The loss is convex in 1/T, so its slope is bisected: exact, and the same on every run.

    Args:
        logits: `[N, classes]`, labels: `[N]` int64.
        weights: `[N]`, how many observations each row stands for; None: one.
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
    """One temperature a class, `[classes]`: from the global one, greedily class by class over a grid of factors, taking what
    lowers the calibration error without lowering the accuracy below that of the unscaled logits.

    Args:
        logits, labels, weights: see `fit_temperature`; the weights count for the global one.
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

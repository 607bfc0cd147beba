"""Measures on logits (METHOD.md 9)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fusion.calibration import expected_calibration_error


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """Part of the rows that are right; answers and labels `[N]`."""
    return float((answers == labels).double().mean())


def macro_accuracy(answers: Tensor, labels: Tensor) -> float:
    """Mean recall over the classes that occur in `labels`; a class that is only answered does not count."""
    right = (answers == labels).double()
    return float(torch.stack([right[labels == k].mean() for k in labels.unique()]).mean())


def by_group(answers: Tensor, labels: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Accuracy by group, sorted by name; `groups` holds one name a row."""
    right = (answers == labels).double()
    names = sorted(set(groups))
    return {name: float(right[torch.tensor([g == name for g in groups])].mean()) for name in names}


def measure(logits: Tensor, labels: Tensor, has_fg: Tensor, groups: Sequence[str] | None = None) -> dict:
    """All figures of one set of logits `[N, classes]`.

    Returns:
        `accuracy`, `macro_accuracy`, `ece`; `with_box` and `without_box` (None where there is no such row); with groups also
        `by_group` and `worst_group`.
    """
    answers = logits.argmax(-1)
    figures: dict = {
        "accuracy": accuracy(answers, labels),
        "macro_accuracy": macro_accuracy(answers, labels),
        "ece": expected_calibration_error(logits, labels),
        "with_box": accuracy(answers[has_fg], labels[has_fg]) if has_fg.any() else None,
        "without_box": accuracy(answers[~has_fg], labels[~has_fg]) if not has_fg.all() else None,
    }
    if groups is not None:
        figures["by_group"] = by_group(answers, labels, groups)
        figures["worst_group"] = min(figures["by_group"].values())
    return figures


def oracle(logits: Sequence[Tensor], labels: Tensor) -> float:
    """Accuracy if one could always pick a branch that is right, where any is."""
    return float(torch.stack([z.argmax(-1) == labels for z in logits]).any(0).double().mean())

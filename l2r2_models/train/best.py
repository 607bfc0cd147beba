"""Choose the best epoch and decide when to stop, from the log of the run, so that interruptions make no difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Best:
    """The best epoch so far.

    Attributes:
        epoch: its number, counted from 1; the first one in case of ties.
        value: its metric.
        epochs: number of evaluated epochs.
    """

    epoch: int
    value: float
    epochs: int

    @property
    def is_last(self) -> bool:
        """Whether the last evaluated epoch is the best."""
        return self.epoch == self.epochs

    def exhausted(self, patience: int) -> bool:
        """Return whether there was no improvement for `patience` epochs; always False for patience 0."""
        return bool(patience) and self.epochs - self.epoch >= patience


def best_of(log: Log, metric: str) -> Best | None:
    """Find the best epoch by a metric for which higher is better.

    Args:
        log: the Trainer's `log_history`.
        metric: name without `eval_`.

    Returns:
        The best epoch; None before the first evaluation.

    >>> best_of([{"eval_accuracy": 0.5}, {"eval_accuracy": 0.7}, {"eval_accuracy": 0.6}], "accuracy")
    Best(epoch=2, value=0.7, epochs=3)
    """
    values = [entry[f"eval_{metric}"] for entry in log if f"eval_{metric}" in entry]
    if not values:
        return None
    index = max(range(len(values)), key=values.__getitem__)
    return Best(index + 1, values[index], len(values))

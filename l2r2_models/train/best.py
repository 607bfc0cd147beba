"""Which epoch is kept, and when to stop: read off the log of the run, so that an interrupted run decides as one that was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Best:
    """The best epoch so far (counted from 1; the first of equals), its figure, and how many epochs were measured."""

    epoch: int
    value: float
    epochs: int

    @property
    def is_last(self) -> bool:
        return self.epoch == self.epochs

    def exhausted(self, patience: int) -> bool:
        """Whether so many epochs came after it that it is time to stop; never with patience 0."""
        return bool(patience) and self.epochs - self.epoch >= patience


def best_of(log: Log, metric: str) -> Best | None:
    """The best epoch by a figure in which more is better, from the Trainer's `log_history`; None before the first one."""
    values = [entry[f"eval_{metric}"] for entry in log if f"eval_{metric}" in entry]
    if not values:
        return None
    index = max(range(len(values)), key=values.__getitem__)
    return Best(index + 1, values[index], len(values))

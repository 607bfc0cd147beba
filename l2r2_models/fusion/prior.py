"""Tabular metadata (site, habitat, month) as a model of the background (L2R2 5.1; `docs/method.md`, section 5) [R]."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import L2R2Error

REACH = 1 / 6  # of the period, the distance from which on values of a circular column no longer count: two months


@dataclass(frozen=True)
class PriorColumn:
    """A metadata column.

    Attributes:
        name: its name.
        period: for a circular column, the number after which its values repeat (12 for months); None for names.
    """

    name: str
    period: float | None = None

    @classmethod
    def parse(cls, text: str) -> PriorColumn:
        """Read `NAME`, or `NAME:PERIOD` for a circular column.

        Raises:
            L2R2Error: when the name is empty, or the period is not a positive number.

        >>> PriorColumn.parse("month:12")
        PriorColumn(name='month', period=12.0)
        """
        name, colon, period = text.strip().rpartition(":") if ":" in text else (text.strip(), "", "")
        value = None if not colon else _number(period)
        if not name or (colon and (value is None or value <= 0)):
            raise L2R2Error(f'"{text}" is not a column; write NAME, or NAME:PERIOD for one that repeats, e.g. month:12.')
        return cls(name, value)

    def __str__(self) -> str:
        return self.name if self.period is None else f"{self.name}:{self.period:g}"

    def weight(self, value: str, other: str) -> float:
        """How much a training row with `other` counts for `value`: 1 or 0; in a circular column it falls with the distance."""
        if self.period is None:
            return float(value == other)
        a, b = _number(value), _number(other)
        if a is None or b is None:
            return 0.0
        apart = abs(a - b) % self.period
        return max(0.0, 1 - min(apart, self.period - apart) / (REACH * self.period))


class MetadataPrior:
    """Correct class probabilities by how often each class occurs with the metadata of an image.

    p(y | x, m) is proportional to p(y | x) p(y | m) / p(y), assuming that the image x and the metadata m are independent given
    the class y. p(y | m) are the counts n(y, m) of the training rows, with s K pseudo-counts distributed like p(y):
    (n(y, m) + s K p(y)) / (n(m) + s K). A value that training rarely saw is thus close to no correction, one that it never saw,
    or that is missing, is none, and no probability becomes zero.

    Args:
        labels: class names, in the order of the logits.
        columns: the metadata columns.
        cells: number of training rows by the values of the columns ("" if missing) and class.
        smoothing: the pseudo-counts s per class.
        joint: whether p(y | m) is counted for the combination of all values, and independently only where this combination was
            not seen; else columns are independent given the class, so their corrections multiply.

    Raises:
        L2R2Error: when there are no rows or columns, a class is unknown, or `smoothing` is not positive.

    >>> import torch
    >>> rows = [{"habitat": "forest"}, {"habitat": "lake"}, {"habitat": "lake"}]
    >>> prior = MetadataPrior.of_rows(("fox", "swan"), ["fox", "swan", "swan"], rows, ["habitat"])
    >>> prior(torch.zeros(2, 2), [{"habitat": "forest"}, {"habitat": "lake"}]).argmax(-1).tolist()
    [0, 1]
    """

    def __init__(
        self,
        labels: Sequence[str],
        columns: Sequence[PriorColumn],
        cells: Mapping[tuple[str, ...], Mapping[str, float]],
        *,
        smoothing: float = 1.0,
        joint: bool = False,
    ) -> None:
        if not cells or not columns:
            raise L2R2Error("A metadata prior needs at least one training row and one column.")
        if not smoothing > 0 or not math.isfinite(smoothing):
            raise L2R2Error(f"The smoothing of a metadata prior must be positive, got {smoothing}.")
        if unknown := sorted({label for counts in cells.values() for label in counts} - set(labels)):
            raise L2R2Error(f'The metadata prior was fitted with the class "{unknown[0]}", which the model does not have.')
        self.labels, self.columns, self.smoothing, self.joint = tuple(labels), tuple(columns), smoothing, joint
        self.cells = {values: dict(counts) for values, counts in cells.items()}
        index = {label: i for i, label in enumerate(labels)}
        self._counts = {values: torch.zeros(len(labels), dtype=torch.float64) for values in cells}
        for values, counts in cells.items():
            for label, count in counts.items():
                self._counts[values][index[label]] += count
        total = sum(self._counts.values(), torch.zeros(len(labels), dtype=torch.float64))
        self._overall = (total + smoothing) / (total + smoothing).sum()  # p(y)
        self._shifts: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def of_rows(
        cls,
        labels: Sequence[str],
        truth: Sequence[str],
        rows: Sequence[Mapping[str, str]],
        columns: Sequence[str],
        *,
        smoothing: float = 1.0,
        joint: bool = False,
    ) -> MetadataPrior:
        """Count training rows.

        Args:
            labels, smoothing, joint: see `MetadataPrior`.
            truth: class of each row.
            rows: metadata of each row.
            columns: columns to use, see `PriorColumn.parse`.

        Raises:
            L2R2Error: also when the number of classes and rows differ, or a circular column has a value that is not a number.
        """
        if len(truth) != len(rows):
            raise L2R2Error(f"A metadata prior needs the metadata of every training row, got {len(rows)} for {len(truth)} rows.")
        parsed = [PriorColumn.parse(text) for text in columns]
        cells: dict[tuple[str, ...], Counter[str]] = {}
        for label, row in zip(truth, rows):
            values = tuple(row.get(column.name, "").strip() for column in parsed)
            for column, value in zip(parsed, values):
                if column.period is not None and value and _number(value) is None:
                    raise L2R2Error(f'The column {column.name} repeats after {column.period:g}, but "{value}" is not a number.')
            cells.setdefault(values, Counter())[label] += 1
        return cls(labels, parsed, cells, smoothing=smoothing, joint=joint)

    def for_labels(self, labels: Sequence[str]) -> MetadataPrior:
        """Return the prior for a model's classes; those that occur in no training row get pseudo-counts alone."""
        return MetadataPrior(labels, self.columns, self.cells, smoothing=self.smoothing, joint=self.joint)

    def __call__(self, logits: Tensor, rows: Sequence[Mapping[str, str]]) -> Tensor:
        """Return the corrected log-probabilities of logits `[N, classes]`, given the metadata of each row."""
        if not len(rows):
            return logits.log_softmax(-1)
        shift = torch.stack([self.shift(row) for row in rows])
        return (logits.double().log_softmax(-1) + shift.to(logits.device)).log_softmax(-1).to(logits.dtype)

    def log_likelihood(self, truth: Sequence[str], rows: Sequence[Mapping[str, str]]) -> float:
        """Return the mean of log p(y | m) over labeled rows; a class that the prior does not know is left out."""
        index = {label: i for i, label in enumerate(self.labels)}
        known = [(index[label], row) for label, row in zip(truth, rows) if label in index]
        found = [float((self._overall.log() + self.shift(row)).log_softmax(-1)[i]) for i, row in known]
        return sum(found) / max(len(found), 1)

    def values_of(self, row: Mapping[str, str]) -> tuple[str, ...]:
        """Return the values of the columns, "" where one is missing."""
        return tuple(row.get(column.name, "").strip() for column in self.columns)

    def shift(self, row: Mapping[str, str]) -> Tensor:
        """Return log p(y | m) - log p(y) for the metadata of one image, `[classes]` float64, up to a constant."""
        values = self.values_of(row)
        if values not in self._shifts:
            self._shifts[values] = self._shift(values)
        return self._shifts[values]

    def _shift(self, values: tuple[str, ...]) -> Tensor:
        places = range(len(values))
        if self.joint and all(values) and (together := self._near(values, places)).sum():
            return self._ratio(together)
        return sum((self._ratio(self._near(values, [i])) for i in places if values[i]), torch.zeros_like(self._overall))

    def _near(self, values: tuple[str, ...], places: Sequence[int]) -> Tensor:
        """Return the weighted counts `[classes]` of the training rows whose values at these places are like the given ones."""
        total = torch.zeros_like(self._overall)
        for cell, counts in self._counts.items():
            weight = math.prod(self.columns[i].weight(values[i], cell[i]) if cell[i] else 0.0 for i in places)
            total += weight * counts
        return total

    def _ratio(self, counts: Tensor) -> Tensor:
        """Return log p(y | m) - log p(y) from counts; exactly 0 without any."""
        pseudo = self.smoothing * len(self.labels)
        if not counts.sum():
            return torch.zeros_like(counts)
        return ((counts + pseudo * self._overall) / (counts.sum() + pseudo)).log() - self._overall.log()


def candidates(columns: Sequence[str]) -> Iterator[tuple[bool, float]]:
    """Yield the settings (joint, smoothing) among which `l2r2 prior fit` chooses on held-out rows, the simplest first."""
    for joint in (False, True) if len(columns) > 1 else (False,):
        for smoothing in (1.0, 0.1, 10.0):
            yield joint, smoothing


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

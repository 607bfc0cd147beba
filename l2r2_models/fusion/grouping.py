"""Grouping of images taken at the same place: by metadata column, folder or time, or in batches of a fixed size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import L2R2Error
from ..images import taken_at

FORMS = "group:COLUMN, folder, sequence:SECONDS, sequence:SECONDS:COLUMN, batch:N or off"


@dataclass(frozen=True)
class Grouping:
    """A rule for grouping images, as given to `--adapt`.

    Attributes:
        kind: `group`, `folder`, `sequence` or `batch`.
        column: metadata column, for `group` and `sequence`.
        size: images per group, for `batch`.
        gap: for `sequence`, the longest time in seconds between an image and the next one of its folder (or of its column's
            value) in the same sequence.
    """

    kind: str
    column: str = ""
    size: int = 0
    gap: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Grouping | None:
        """Parse the value of `--adapt`; returns None for `off`.

        Raises:
            L2R2Error: when the kind is unknown, the column is missing, or the size or the gap is not a positive number.

        >>> Grouping.parse("sequence:60:site")
        Grouping(kind='sequence', column='site', size=0, gap=60.0)
        """
        kind, _, value = text.partition(":")
        if text == "off":
            return None
        if text == "folder" or (kind == "group" and value):
            return cls(kind, value)
        if kind == "batch" and value.isdecimal() and int(value) > 0:
            return cls(kind, size=int(value))
        if kind == "sequence":
            seconds, _, column = value.partition(":")
            if (gap := _positive(seconds)) is not None:
                return cls(kind, column, gap=gap)
        raise L2R2Error(f'Unknown grouping "{text}"; --adapt takes {FORMS}.')

    @property
    def noun(self) -> str:
        """The word for a group in messages: the column name, `folder` or `batch`."""
        return self.column if self.kind == "group" else self.kind

    def __str__(self) -> str:
        if self.kind == "sequence":
            return f"sequence:{self.gap:g}{self.column and ':'}{self.column}"
        return "folder" if self.kind == "folder" else f"{self.kind}:{self.column or self.size}"

    def of(self, paths: Sequence[str | Path], columns: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the group of each row, whatever their order; rows of the same image share a group.

        Args:
            paths: one path per row; batches are made of images that are consecutive when sorted by path.
            columns: metadata per row. An image without a value, or without a time for `sequence`, forms its own group.

        Raises:
            L2R2Error: when no row has the column, or no image has a time in its EXIF data.

        >>> Grouping("folder").of(["a/1.jpg", "b/2.jpg"], [{}, {}])
        ['a', 'b']
        """
        names = [str(path) for path in paths]
        if self.kind == "sequence":
            return self._sequences(names, columns)
        if self.kind == "folder":
            return [str(Path(name).parent) for name in names]
        if self.kind == "batch":
            number = {name: i // self.size + 1 for i, name in enumerate(sorted(set(names)))}
            return [str(number[name]) for name in names]
        return self._values(names, columns)

    def _values(self, names: Sequence[str], columns: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the value of the column per row."""
        if not any(self.column in values for values in columns):
            known = ", ".join(dict.fromkeys(key for values in columns for key in values)) or "none"
            raise L2R2Error(f'No image has the column "{self.column}" in its metadata; there are {known}.')
        return [values.get(self.column) or name for name, values in zip(names, columns)]

    def _sequences(self, names: Sequence[str], columns: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the first image of each row's sequence."""
        places = self._values(names, columns) if self.column else [str(Path(name).parent) for name in names]
        times = {name: taken_at(name) for name in dict.fromkeys(names)}
        if not any(time is not None for time in times.values()):
            raise L2R2Error(f"{names[0]}: has no time in its EXIF data, nor has any other image; use folder or a column.")
        taken = sorted({(place, time, name) for place, name in zip(places, names) if (time := times[name]) is not None})
        first: dict[str, str] = {}
        before = "", -math.inf, ""
        for place, time, name in taken:
            continues = place == before[0] and time - before[1] <= self.gap
            first[name] = first[before[2]] if continues else name
            before = place, time, name
        return [first.get(name, name) for name in names]


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None

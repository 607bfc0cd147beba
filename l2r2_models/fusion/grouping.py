"""Grouping of images taken at the same place: by metadata column, by folder, or in batches of a fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import L2R2Error

FORMS = "group:COLUMN, folder, batch:N or off"


@dataclass(frozen=True)
class Grouping:
    """A rule for grouping images, as given to `--adapt`.

    Attributes:
        kind: `group`, `folder` or `batch`.
        column: metadata column, for `group`.
        size: images per group, for `batch`.
    """

    kind: str
    column: str = ""
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Grouping | None:
        """Parse the value of `--adapt`; returns None for `off`.

        Raises:
            L2R2Error: when the kind is unknown, the column is missing, or the size is not a positive integer.

        >>> Grouping.parse("batch:32")
        Grouping(kind='batch', column='', size=32)
        """
        kind, _, value = text.partition(":")
        if text == "off":
            return None
        if text == "folder" or (kind == "group" and value):
            return cls(kind, value)
        if kind == "batch" and value.isdecimal() and int(value) > 0:
            return cls(kind, size=int(value))
        raise L2R2Error(f'Unknown grouping "{text}"; --adapt takes {FORMS}.')

    @property
    def noun(self) -> str:
        """The word for a group in messages: the column name, `folder` or `batch`."""
        return self.column if self.kind == "group" else self.kind

    def __str__(self) -> str:
        return "folder" if self.kind == "folder" else f"{self.kind}:{self.column or self.size}"

    def of(self, paths: Sequence[str | Path], columns: Sequence[Mapping[str, str]]) -> list[str]:
        """Return the group of each row, whatever their order; rows of the same image share a group.

        Args:
            paths: one path per row; batches are made of images that are consecutive when sorted by path.
            columns: metadata per row. An image without a value forms its own group.

        Raises:
            L2R2Error: when no row has the column.

        >>> Grouping("folder").of(["a/1.jpg", "b/2.jpg"], [{}, {}])
        ['a', 'b']
        """
        names = [str(path) for path in paths]
        if self.kind == "folder":
            return [str(Path(name).parent) for name in names]
        if self.kind == "batch":
            number = {name: i // self.size + 1 for i, name in enumerate(sorted(set(names)))}
            return [str(number[name]) for name in names]
        if not any(self.column in values for values in columns):
            known = ", ".join(dict.fromkeys(key for values in columns for key in values)) or "none"
            raise L2R2Error(f'No image has the column "{self.column}" in its metadata; there are {known}.')
        return [values.get(self.column) or name for name, values in zip(names, columns)]

"""Which images are of one place: by a metadata column, by folder, or in batches of a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import L2R2Error

FORMS = "group:COLUMN, folder, batch:N or off"


@dataclass(frozen=True)
class Grouping:
    """How images are grouped, as `--adapt` takes it.

    Attributes:
        kind: `group`, `folder` or `batch`.
        column: the metadata column of `group`. size: images of a `batch`.
    """

    kind: str
    column: str = ""
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Grouping | None:
        """The grouping that `--adapt` names; None for `off`.

        Raises:
            L2R2Error: another word, no column, or a size that is no positive number.

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
        raise L2R2Error(f'Images can be adapted to by {FORMS}, not "{text}".')

    @property
    def noun(self) -> str:
        """What a group is called in a sentence."""
        return self.column if self.kind == "group" else self.kind

    def __str__(self) -> str:
        return "folder" if self.kind == "folder" else f"{self.kind}:{self.column or self.size}"

    def of(self, paths: Sequence[str | Path], columns: Sequence[Mapping[str, str]]) -> list[str]:
        """The group of each image; rows of one image share it, and the order of rows does not matter.

        Args:
            paths: one a row; a batch takes images that follow one another by path.
            columns: the metadata of each row. An image without a value is a group of its own.

        Raises:
            L2R2Error: no row has the column.
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

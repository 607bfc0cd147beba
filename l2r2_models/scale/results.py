"""Rows of predictions or boxes on their way from the workers to the output, and what is counted in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..boxes import BoxEntry
from ..boxes.parquet import arrow_table
from ..io import pyarrow
from ..predict.formats import escaped, parquet_schema, parquet_tables
from ..predict.prediction import LOCALIZER_FAILED

UNREADABLE = ": cannot be read ("  # a failure that may pass: the disk, the network, the permissions
FIRST = 10  # failures whose reasons are kept per partition


@dataclass(frozen=True)
class Tally:
    """Counts of predictions, or of the images of a box file.

    Attributes:
        images: number of images.
        found: number of predictions for an object that was found, or of images with a box.
        whole: number of predictions for the whole image, or of images without a box.
        failed: number of images without a prediction, or without a result of the localizer.
        unlocalized: number of images that were classified as a whole because the localizer failed.
        retry: number of failures that may pass; a partition with one is done again by the same command.
        reasons: the first failures.
    """

    images: int = 0
    found: int = 0
    whole: int = 0
    failed: int = 0
    unlocalized: int = 0
    retry: int = 0
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Tally:
        """Count the records of images."""
        tally = cls()
        for record in records:
            objects, failure = record.get("objects", ()), record.get("failure")
            why = [o["reason"] for o in objects if o["reason"].startswith(LOCALIZER_FAILED)][:1]
            found = sum("fg" in o for o in objects)
            again = bool(why) or (failure is not None and UNREADABLE in failure)
            reasons = (*([] if failure is None else [failure]), *why)
            tally += cls(1, found, len(objects) - found, int(failure is not None), len(why), int(again), reasons)
        return tally

    @classmethod
    def of_boxes(cls, entries: Mapping[str, BoxEntry]) -> Tally:
        """Count the entries of images; all failures may pass except those that name the image, which is then damaged."""
        failures = {name: entry.failure for name, entry in entries.items() if entry.failure is not None}
        found = sum(bool(entry.boxes) for entry in entries.values())
        again = sum(UNREADABLE in why or not why.startswith(f"{name}:") for name, why in failures.items())
        whole = len(entries) - len(failures) - found
        return cls(len(entries), found, whole, len(failures), 0, again, tuple(failures.values())[:FIRST])

    @classmethod
    def parse(cls, text: bytes) -> Tally:
        """Read the counts that `dumps` wrote."""
        counts = json.loads(text)
        return cls(**{**counts, "reasons": tuple(counts["reasons"])})

    def dumps(self) -> bytes:
        """Return the counts as JSON."""
        return json.dumps(asdict(self)).encode()

    def __add__(self, other: Tally) -> Tally:
        counts = {name: value + getattr(other, name) for name, value in asdict(self).items() if name != "reasons"}
        return Tally(**counts, reasons=(self.reasons + other.reasons)[:FIRST])


@dataclass(frozen=True)
class Rows:
    """The rows of some images.

    Attributes:
        table: Arrow table with the columns of a prediction file, or of a box file.
        tally: counts of them.
        records: name and JSON of each image, if branch logits were kept.
    """

    table: Any
    tally: Tally
    records: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, records: list[dict[str, Any]], keep: bool = False) -> Rows:
        """Convert the records of images to rows; with `keep`, keep the records too."""
        pa, _ = pyarrow()
        table = pa.concat_tables([parquet_schema().empty_table(), *parquet_tables(records)])
        return cls(table, Tally.of(records), tuple((record["file"], json.dumps(record)) for record in records if keep))

    @classmethod
    def of_boxes(cls, entries: Mapping[str, BoxEntry], stamps: Mapping[str, str]) -> Rows:
        """Convert the entries of images to rows; an image whose name Parquet cannot store is one with a failure."""
        kept = dict(_storable(name, entry) for name, entry in entries.items())
        return cls(arrow_table(kept, stamps), Tally.of_boxes(kept))

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """Join the rows of several slices, of which there is at least one."""
        pa, _ = pyarrow()
        parts = list(parts)
        table = pa.concat_tables([part.table for part in parts])
        tally = sum((part.tally for part in parts), Tally())
        return cls(table, tally, tuple(record for part in parts for record in part.records))


def _storable(name: str, entry: BoxEntry) -> tuple[str, BoxEntry]:
    """Return a name that is UTF-8 with its entry, or the escaped name with a failure, because boxes could not be joined by it."""
    if (text := escaped(name)) == name:
        return name, entry
    return text, BoxEntry(failure=f"{text}: the file name is not UTF-8, as a Parquet file needs; rename the image.")


class Assembly:
    """Partitions that are arriving, slice by slice and in any order; a slice that arrives twice counts once.

    Args:
        empty: the rows of a partition without images.
    """

    def __init__(self, empty: Rows | None = None) -> None:
        self._empty = Rows.of([]) if empty is None else empty
        self._slices: dict[str, dict[int, Rows]] = {}
        self._ends: dict[str, int] = {}

    def add(self, key: str, number: int, rows: Rows | None) -> Rows | None:
        """Add a slice, or the end of a partition, and return the rows of its partition if it is complete now."""
        held = self._slices.setdefault(key, {})
        if rows is None:
            self._ends[key] = number
        else:
            held[number] = rows
        if len(held) != self._ends.get(key, -1):
            return None
        del self._slices[key], self._ends[key]
        return Rows.joined([self._empty, *(held[i] for i in range(len(held)))])

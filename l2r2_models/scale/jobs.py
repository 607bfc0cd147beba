"""Bulk jobs: partitions are worked on, assembled and written, each exactly once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..fusion import GroupShare
from .engine import Work
from .output import Output
from .partitions import Partition
from .results import Assembly, Rows, Tally

Progress = Callable[[Iterable[tuple[str, Rows]], int], Iterable[tuple[str, Rows]]]


@dataclass(frozen=True)
class Report:
    """Summary of a bulk job.

    Attributes:
        partitions: number of partitions of the input.
        kept: number of those that were there before.
        tally: counts of the images and objects in all of them.
        header: the model or localizer and the settings that they are made with.
        shares: fraction of misleading backgrounds by group, if predictions are adapted.
    """

    partitions: int
    kept: int
    tally: Tally
    header: Mapping[str, Any]
    shares: dict[str, GroupShare] = field(default_factory=dict)


def fill(
    output: Output,
    partitions: Sequence[Partition],
    results: Callable[[Work], Iterator[Mapping[str, Any]]],
    empty: Rows,
    progress: Progress,
    table: Callable[[Rows], Any] | None = None,
) -> Report:
    """Complete an output: work on those partitions that it does not have yet.

    Args:
        output: the output, of which this process is the only writer.
        partitions: all partitions, in the order of the images.
        results: returns the slices of partitions, in any order; takes rows `{key, data}` with the pickled partition.
        empty: rows of a partition without images.
        progress: wraps the partitions; takes their iterable and their number.
        table: returns the table to write; by default that of the rows.
    """
    keys = [part.key for part in partitions]
    kept = output.finished(keys)
    output.start()
    tally = sum(kept.values(), Tally())
    todo = [{"key": part.key, "data": pickle.dumps(part, pickle.HIGHEST_PROTOCOL)} for part in partitions if part.key not in kept]
    for key, rows in progress(_assembled(results(todo), empty), len(todo)):
        output.write(key, rows.table if table is None else table(rows), rows.tally)
        tally += rows.tally
    output.finish(keys)
    return Report(len(keys), len(kept), tally, output.header)


def _assembled(slices: Iterable[Mapping[str, Any]], empty: Rows) -> Iterator[tuple[str, Rows]]:
    """Yield key and rows of each partition as soon as it is complete."""
    assembly = Assembly(empty)
    for one in slices:
        data = pickle.loads(one["data"]) if one["data"] else None
        if (rows := assembly.add(one["key"], int(one["slice"]), data)) is not None:
            yield one["key"], rows

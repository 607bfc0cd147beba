"""Partitions: the units of work and of output, named by the content that their predictions depend on.

A list of images is cut after the images whose path hashes to a multiple of the partition size, so that an image more or less
changes one partition and leaves the others (content-defined chunking, as in rsync). A shard is one partition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..boxes import BoxEntry, BoxTable
from ..predict.inputs import Inputs
from ..shards import state_of
from .places import Place, State

T = TypeVar("T")
SIZE = 1024  # images per partition, on average
LONGEST = 4  # the longest partition, in multiples of the average


@dataclass(frozen=True)
class Partition:
    """Images that are predicted together.

    Attributes:
        key: hash of everything that the predictions depend on, besides the header of the output.
        names: names of the images; empty for a shard.
        entries: box entries by name.
        masks: mask files by name.
        places: where the images are, if not on this machine under their names.
        shard: name and place of a WebDataset or Parquet shard.
    """

    key: str
    names: tuple[str, ...] = ()
    entries: Mapping[str, BoxEntry] = field(default_factory=dict)
    masks: Mapping[str, Path] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    shard: tuple[str, Place] | None = None


def chunks(items: Iterable[T], name: Callable[[T], str], size: int) -> Iterator[list[T]]:
    """Cut items into lists of `size` on average, at most four times as many, at places that depend on the names alone.

    >>> parts = list(chunks([f"{i}.jpg" for i in range(20)], str, 4))
    >>> more = list(chunks([f"{i}.jpg" for i in range(-1, 20)], str, 4))
    >>> parts[1:] == more[1:]
    True
    """
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) >= LONGEST * size or int(hashed(name(item))[:8], 16) % size == 0:
            yield held
            held = []
    if held:
        yield held


def of_files(inputs: Inputs, about: Callable[[str], Any], size: int) -> Iterator[Partition]:
    """Yield the partitions of image files on this machine.

    Args:
        inputs: the images, with boxes and masks.
        about: returns what else the prediction for an image depends on, by name.
        size: images per partition, on average.
    """
    for names in chunks(map(str, inputs.paths), str, size):
        entries = {name: inputs.entries[name] for name in names if name in inputs.entries}
        masks = {name: inputs.masks[name] for name in names if name in inputs.masks}
        states = [(name, state_of(name), entries.get(name), state_of(masks.get(name)), about(name)) for name in names]
        yield Partition(hashed(states), tuple(names), entries, masks)


def of_places(
    images: Sequence[tuple[Place, State]], boxes: BoxTable | None, about: Callable[[str], Any], size: int
) -> Iterator[Partition]:
    """Yield the partitions of images in an object store, with the entries of a box file; further arguments as for `of_files`."""
    entries = {} if boxes is None or not images else boxes.join(str(place) for place, _ in images)
    for part in chunks(images, lambda image: str(image[0]), size):
        names = tuple(str(place) for place, _ in part)
        found = {name: entries[name] for name in names if name in entries}
        states = [(name, state, found.get(name), about(name)) for name, (_, state) in zip(names, part)]
        yield Partition(hashed(states), names, found, places=tuple(place for place, _ in part))


def of_shard(name: str, place: Place, state: State, boxes: str) -> Partition:
    """Return the partition of a shard.

    Args:
        name: its name in the output.
        place: where it is.
        state: its size and modification time.
        boxes: hash of the box file; empty without one.
    """
    return Partition(hashed((name, state, boxes)), shard=(name, place))


def hashed(data: Any) -> str:
    """Return a hash of plain values, as a name for files."""
    return hashlib.sha256(repr(data).encode(errors="backslashreplace")).hexdigest()[:20]

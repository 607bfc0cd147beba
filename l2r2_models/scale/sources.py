"""The images of a bulk job among files, folders, data sets, URLs and shards, as partitions."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..boxes import BoxTable, read_boxes
from ..errors import L2R2Error
from ..fusion import Grouping
from ..io import file_sha256, pyarrow
from ..localize import Localizer
from ..predict.inputs import Inputs, gather
from ..shards import SUFFIXES, columns_of
from .adapt import Groups
from .partitions import SIZE, Partition, of_files, of_places, of_shard
from .places import Place, State, url_of


@dataclass(frozen=True)
class Sources:
    """The images of a bulk job.

    Attributes:
        inputs: those in files of this machine, with their boxes.
        places: those in object stores, by place and state.
        shards: shards by name, with their place and state.
        boxes: box file of the images that are not in `inputs`.
        boxes_digest: hash of that file.
    """

    inputs: Inputs
    places: tuple[tuple[Place, State], ...] = ()
    shards: tuple[tuple[str, Place, State], ...] = ()
    boxes: BoxTable | None = None
    boxes_digest: str = ""

    @property
    def oracle(self) -> bool:
        """Whether the boxes were found with the true labels as prompts."""
        return self.inputs.oracle or (self.boxes is not None and bool(self.boxes.info.get("oracle")))

    def groups(self, grouping: Grouping) -> Groups:
        """Return the groups of the images.

        Raises:
            L2R2Error: when the rule is `batch` or `sequence`, or on a metadata column and not every image has metadata.
        """
        if grouping.kind in ("batch", "sequence") or (grouping.kind == "group" and (self.places or self.shards)):
            raise L2R2Error("On the engine ray, predictions are adapted by folder, or group:COLUMN of a data set's metadata.")
        names = [str(path) for path in self.inputs.paths]
        columns = [self.inputs.columns.get(name, {}) for name in names]
        return Groups(grouping, dict(zip(names, grouping.of(names, columns))) if grouping.kind == "group" else {})

    def partitions(self, localizer: Localizer | None, groups: Groups | None = None, size: int = SIZE) -> Iterator[Partition]:
        """Yield the partitions, in the order of the images.

        Args:
            localizer: finds the boxes of the images, if it does.
            groups: groups of the images, if predictions are adapted.
            size: images per partition, on average.

        Raises:
            L2R2Error: when the size is not positive.
        """
        if size < 1:
            raise L2R2Error(f"The partition size must be at least 1, got {size}.")

        def about(name: str) -> object:
            located = None if localizer is None else localizer.about(name)
            return located, None if groups is None else groups.of(name)

        yield from of_files(self.inputs, about, size)
        yield from of_places(self.places, self.boxes, about, size)
        for name, place, state in self.shards:
            yield of_shard(name, place, state, self.boxes_digest)


def find(sources: Sequence[str | Path], boxes: Path | None = None, split: str | None = None, *, given: bool = True) -> Sources:
    """Find the images among files, folders, data sets, URLs and shards.

    Args:
        sources: those of `predict.inputs.gather`; URLs of images or folders, e.g. `s3://bucket/photos`; and WebDataset (`.tar`)
            or Parquet shards, by path, pattern or URL. A folder at a URL may contain images and shards.
        boxes: box file, joined by path.
        split: use only this split of the data sets.
        given: use the boxes in the metadata of data sets; False for a localizer.

    Raises:
        L2R2Error: when there is no image, a place cannot be listed, or the box file lists none of the images.
    """
    local: list[Path] = []
    places: dict[str, tuple[Place, State]] = {}  # by name, so that overlapping sources give each image once
    shards: dict[str, tuple[str, Place, State]] = {}
    for source in sources:
        if url_of(source) is not None:
            images, packed = _listed(Place.of(source))
            places.update((str(place), (place, state)) for place, state in images)
            shards.update((name, (name, place, state)) for name, place, state in packed)
        elif str(source).lower().endswith(SUFFIXES):
            shards.update((name, (name, place, state)) for name, place, state in _local_shards(source))
        else:
            local.append(Path(source))
    for name, place, _ in shards.values():
        _check_shard(name, place)
    remote = bool(places or shards)
    inputs = gather(local, None if remote else boxes, split) if local else Inputs((), {}, {}, {})
    if local and remote and boxes is not None:
        raise L2R2Error(f"{boxes}: cannot be joined to files and URLs or shards at once; predict them one after the other.")
    table = read_boxes(boxes) if remote and boxes is not None else None
    digest = _digest_of(boxes) if table is not None and boxes is not None else ""
    return Sources(inputs if given else inputs.without_boxes(), tuple(places.values()), tuple(shards.values()), table, digest)


def _digest_of(boxes: Path) -> str:
    """Return the digest of a box file, or of the partitions in a folder."""
    if not boxes.is_dir():
        return file_sha256(boxes)
    parts = sorted(boxes.glob("*.parquet"))
    return hashlib.sha256(" ".join(file_sha256(part) for part in parts).encode()).hexdigest()


def _listed(root: Place) -> tuple[list[tuple[Place, State]], list[tuple[str, Place, State]]]:
    """Return the images and the shards in an object store.

    Raises:
        L2R2Error: when there are none.
    """
    shards = [(str(place), place, state) for place, state in root.files() if place.path.lower().endswith(SUFFIXES)]
    packed = {place.path for _, place, _ in shards}
    images = [(place, state) for place, state in root.images() if place.path not in packed]
    if not images and not shards:
        raise L2R2Error(f"{root}: no image and no shard at this place.")
    return images, shards


def _local_shards(source: str | Path) -> Iterator[tuple[str, Place, State]]:
    matches = sorted(glob.glob(str(source))) if glob.has_magic(str(source)) and not Path(source).exists() else [str(source)]
    if not matches:
        raise L2R2Error(f"{source}: no shard matches this pattern.")
    for name in matches:
        found = list(Place.of(name).files())
        if len(found) != 1:
            raise L2R2Error(f"{name}: no such shard.")
        yield name, *found[0]


def _check_shard(name: str, place: Place) -> None:
    """Check that a Parquet shard has a column of images; one that is damaged is left to the failures."""
    if not name.lower().endswith(".parquet"):
        return
    pa, parquet = pyarrow()
    try:
        with place.filesystem.open_input_file(place.path) as stream:
            schema = parquet.read_schema(stream)
    except (OSError, pa.ArrowException):
        return
    columns_of(schema, name)

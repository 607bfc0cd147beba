"""Read a folder of images as a table with one row per image: label, split, boxes and other columns."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..boxes import BoxEntry, entries_of_rows, read_boxes, read_rows
from ..errors import L2R2Error
from ..images import is_image_path
from ..shards import state_of
from .hf_datasets import PREFIX, as_folder, is_source
from .layout import SPLIT_NAMES, described_splits, metadata_in
from .shards import packed_in, records_of


@dataclass(frozen=True)
class Row:
    """One item of a data set.

    Attributes:
        path: the image file, or an image in a shard.
        label: its class, or None.
        split: its split, or None.
        entry: its boxes, or None.
        mask_file: the file of the object's mask, or None.
        columns: its other metadata, as pairs of name and value.
        background: another row whose object-free background replaces this one's, see `sample_of` and `swap.swapped`.
    """

    path: Path
    label: str | None = None
    split: str | None = None
    entry: BoxEntry | None = None
    mask_file: Path | None = None
    columns: tuple[tuple[str, str], ...] = ()
    background: Row | None = None

    @property
    def has_mask(self) -> bool:
        """Whether the row has a mask file, or a box with a mask."""
        return self.mask_file is not None or (self.entry is not None and any(mask is not None for mask in self.entry.masks))

    def may_have_object(self, box_threshold: float) -> bool:
        """Return whether the row has a mask, or a box with at least this score; boxes outside the image are not excluded."""
        return self.mask_file is not None if self.entry is None else any(s >= box_threshold for s in self.entry.scores)

    @property
    def is_bare(self) -> bool:
        """Whether the row lists no mask and no boxes; an empty list of boxes (none found) counts as listed."""
        return self.mask_file is None and self.entry is None


@dataclass(frozen=True)
class ImageTable:
    """The images of one data set, in a fixed order.

    Attributes:
        root: the data set's folder.
        rows: the rows.
        boxes_from: `BoxTable.info` of the file that the boxes come from.
    """

    root: Path
    rows: tuple[Row, ...]
    boxes_from: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in order of appearance."""
        return tuple(dict.fromkeys(row.split for row in self.rows if row.split))

    def of_split(self, name: str) -> ImageTable:
        """Return the rows of one split.

        Raises:
            L2R2Error: when it has no rows.
        """
        rows = tuple(row for row in self.rows if row.split == name)
        if not rows:
            known = f"it has {', '.join(self.splits)}" if self.splits else "it has no splits"
            raise L2R2Error(f'{self.root}: no image has the split "{name}"; {known}.')
        return replace(self, rows=rows)

    def of_names(self, names: Iterable[str]) -> ImageTable:
        """Return the rows whose path relative to the root is in `names`."""
        wanted = set(names)
        return replace(self, rows=tuple(row for name, row in zip(self.names(), self.rows) if name in wanted))

    def column(self, name: str) -> list[str]:
        """Return the values of a metadata column.

        Raises:
            L2R2Error: when a row does not have it.
        """
        columns = [dict(row.columns) for row in self.rows]
        if lacking := [row for row, values in zip(self.rows, columns) if name not in values]:
            known = ", ".join(dict(lacking[0].columns)) or "none"
            raise L2R2Error(f'{self.root}: {self._name(lacking[0])} has no column "{name}" in the metadata; there are {known}.')
        return [values[name] for values in columns]

    def classes(self) -> tuple[str, ...]:
        """Return the labels, sorted.

        Raises:
            L2R2Error: when an image has no label, or there are fewer than two classes.
        """
        if missing := [row for row in self.rows if not row.label]:
            raise L2R2Error(
                f"{self.root}: {len(missing)} of {len(self.rows)} images have no label, the first is {self._name(missing[0])}; "
                "add a `label` column to the metadata or the shards, or use one folder per class."
            )
        labels = tuple(sorted({str(row.label) for row in self.rows}))
        if len(labels) < 2:
            raise L2R2Error(f'{self.root}: all images have the class "{labels[0]}"; a classifier needs two or more classes.')
        return labels

    def names(self) -> list[str]:
        """Return the paths of the images relative to the root."""
        return [self._name(row) for row in self.rows]

    def _name(self, row: Row) -> str:
        return Path(os.path.relpath(row.path, self.root)).as_posix()

    def entries(self) -> dict[str, BoxEntry]:
        """Return the boxes by image path, for images that have an entry; the boxes of the rows of one image are merged."""
        joined: dict[str, BoxEntry] = {}
        for row in self.rows:
            if row.entry is not None:
                old = joined.get(str(row.path))
                joined[str(row.path)] = row.entry if old is None else _together(old, row.entry)
        return joined

    def whole_images(self) -> list[Row]:
        """Return one row per image with the boxes of all its rows, without a label if these have several."""
        entries = self.entries()
        first: dict[Path, Row] = {}
        for row in self.rows:
            old = first.setdefault(row.path, replace(row, entry=entries.get(str(row.path))))
            if old.label != row.label:
                first[row.path] = replace(old, label=None)
        return list(first.values())

    def label_counts(self) -> Counter[str]:
        """Count the rows per label."""
        return Counter(str(row.label) for row in self.rows)


def read_table(
    root: str | Path, *, metadata: str | Path | None = None, boxes: str | Path | None = None, missing_ok: bool = False
) -> ImageTable:
    """Read a data set.

    Supported layouts: an `imagefolder` with metadata.csv or .jsonl, at the root or in each of its folders train, val and test
    (columns file_name and label, optionally split, mask_file, and boxes as in `boxes.entries_of_rows`); one folder per class, at
    the root or in folders train, val and test; WebDataset or Parquet shards, see `shards.records_of`; a data set of the Hugging
    Face Hub or one saved on disk, see `hf_datasets.as_folder`.

    There is one row per image, unless its boxes are annotations, with class labels and a score of 1: then an image without a
    label gets one row per box, and an image with a label keeps only the boxes of its class. Labels from a localizer are ignored.

    Args:
        root: the folder, a single shard, or `hf:` and an id.
        metadata: another metadata file for the folder's images; file names stay relative to the folder.
        boxes: a box file that replaces the boxes of the metadata, joined by path.
        missing_ok: whether to keep rows whose image is missing.

    Raises:
        L2R2Error: when there are no images, a listed image is missing, rows contradict each other, or the boxes match no image.

    >>> read_table("data/").splits  # doctest: +SKIP
    ('train', 'test')
    """
    root = as_folder(root) if is_source(root) else Path(root)
    if root.is_file() and (shards := packed_in(root)):
        if metadata is not None:
            raise L2R2Error(f"{root}: a metadata file describes the images of a folder; pass {root.parent} instead.")
        root = root.parent
        rows = _rows_of_records(root, records_of(root, shards), str(shards[0]), missing_ok=True)
    elif not root.is_dir():
        hint = f"; for a data set on the Hub, use {PREFIX}ORG/NAME" if len(root.parts) == 2 and not root.is_absolute() else ""
        hint = "; data sets are read from a disk, so mount or copy it" if re.match(r"[a-z][a-z0-9+.-]+:/", str(root)) else hint
        raise L2R2Error(f"{root}: no such folder{hint}.")
    else:
        rows = _rows_of(root, Path(metadata) if metadata else metadata_in(root), missing_ok)
    info: dict[str, Any] = {}
    if boxes is not None:
        found = read_boxes(boxes)
        joined, info = found.join(row.path for row in rows), found.info
        rows = [replace(row, entry=joined.get(str(row.path))) for row in rows]
    return ImageTable(root, tuple(_distinct(_by_object(rows), str(boxes or root))), info)


def _distinct(rows: list[Row], source: str) -> list[Row]:
    """Remove duplicate rows; one object cannot have two classes."""
    seen: dict[tuple[Path, BoxEntry | None, Path | None], Row] = {}
    for row in rows:
        if seen.setdefault((row.path, row.entry, row.mask_file), row).label != row.label:
            raise L2R2Error(f"{source}: {row.path.name} has several labels, but not a box for each; add the boxes.")
    return list(seen.values())


def _rows_of(root: Path, listed: Path | None, missing_ok: bool) -> list[Row]:
    if listed is not None:
        return _rows_of_metadata(root, listed, missing_ok)
    if inside := described_splits(root):
        parts = [(folder, _rows_of_metadata(folder, file, missing_ok)) for folder, file in inside.items()]
        return [replace(row, split=row.split or folder.name) for folder, rows in parts for row in rows]
    if shards := packed_in(root):
        return _rows_of_records(root, records_of(root, shards), str(root), missing_ok=True)  # listed, so not missing
    return _rows_of_folders(root)


def _rows_of_metadata(root: Path, file: Path | None, missing_ok: bool) -> list[Row]:
    if file is None or not file.is_file():
        raise L2R2Error(f"{file}: no such metadata file.")
    records = [{**record, "file_name": posixpath.normpath(str(record["file_name"]))} for record in read_rows(file)]
    return _rows_of_records(root, records, str(file), missing_ok)


def _rows_of_records(root: Path, records: Sequence[Mapping[str, Any]], file: str, missing_ok: bool) -> list[Row]:
    entries = entries_of_rows(records, file)
    has_boxes = any(entry.boxes for entry in entries.values())
    of_line = entries_of_rows([{**record, "file_name": str(i)} for i, record in enumerate(records)], file)
    by_file: dict[str, list[Row]] = {}
    for i, record in enumerate(records):
        name = record["file_name"]
        if not missing_ok and name not in by_file and not _exists(root / name):
            raise L2R2Error(f"{file}: lists {name}, which is not in {root}; add the image, or remove the row.")
        texts = {k: None if record.get(k) in (None, "") else str(record[k]) for k in ("label", "split", "mask_file")}
        row = Row(
            root / name,
            texts["label"],
            texts["split"],
            of_line[str(i)] if has_boxes else None,
            root / texts["mask_file"] if texts["mask_file"] else None,
            tuple((k, str(v)) for k, v in record.items() if isinstance(v, (str, int, float))),
        )
        by_file.setdefault(name, []).append(row)
    return [
        row for name, rows in by_file.items() for row in _of_one_image(rows, entries[name] if has_boxes else None, name, file)
    ]


def _of_one_image(rows: list[Row], entry: BoxEntry | None, name: str, file: str) -> list[Row]:
    """Return the rows of one image: one with all boxes, or one per line of the metadata if each has its own box and label."""
    own_boxes = all(row.entry is not None and row.entry.boxes for row in rows)
    for what in ("split",) if own_boxes else ("split", "label", "mask_file"):
        if len(values := list(dict.fromkeys(getattr(row, what) for row in rows))) > 1:
            raise L2R2Error(f"{file}: {name} has two values of {what}, {values[0]} and {values[1]}; keep one of them.")
    if len({(row.label, row.mask_file) for row in rows}) > 1:
        return rows
    return [replace(rows[0], entry=entry)]


def _by_object(rows: list[Row]) -> list[Row]:
    """Split or filter rows by their labeled boxes, see `read_table`."""

    def labels_of(row: Row) -> tuple[str, ...]:
        return row.entry.labels if row.entry is not None and all(score == 1 for score in row.entry.scores) else ()

    classes = {label for row in rows for label in labels_of(row) if label}
    if any(row.label for row in rows):
        classes &= {str(row.label) for row in rows}
    split_rows = []
    for row in rows:
        labels = labels_of(row)
        if row.entry is None or classes.isdisjoint(labels):
            split_rows.append(row)
        elif row.label:
            split_rows.append(replace(row, entry=_only(row.entry, [i for i, label in enumerate(labels) if label == row.label])))
        else:
            boxes = [(i, label) for i, label in enumerate(labels) if label in classes]
            split_rows += [replace(row, label=label, entry=_only(row.entry, [i])) for i, label in boxes]
    return split_rows


def _together(first: BoxEntry, second: BoxEntry) -> BoxEntry:
    """Merge two entries of one image, without duplicate boxes."""
    new = [i for i, box in enumerate(second.boxes) if box not in first.boxes]
    more = _only(second, new)
    masks = tuple(mask for entry in (first, more) for mask in (entry.masks or (None,) * len(entry.boxes)))
    return replace(
        first,
        boxes=first.boxes + more.boxes,
        scores=first.scores + more.scores,
        labels=first.labels + more.labels,
        masks=masks if any(masks) else (),
    )


def _only(entry: BoxEntry, keep: list[int]) -> BoxEntry:
    """Return the entry with only the boxes at these positions."""
    return replace(
        entry,
        boxes=tuple(entry.boxes[i] for i in keep),
        scores=tuple(entry.scores[i] for i in keep),
        labels=tuple(entry.labels[i] for i in keep),
        masks=tuple(entry.masks[i] for i in keep) if entry.masks else (),
    )


def _rows_of_folders(root: Path) -> list[Row]:
    """Read a folder without metadata: the label is the first folder, or the second if all first folders are splits."""
    paths = sorted(p for p in root.rglob("*") if is_image_path(p.relative_to(root)) and p.is_file())
    if not paths:
        raise L2R2Error(f"{root}: no image in this folder.")
    parents = [path.relative_to(root).parts[:-1] for path in paths]
    splits = all(folders and folders[0].lower() in SPLIT_NAMES for folders in parents)
    rows = []
    for path, folders in zip(paths, parents):
        label = folders[splits] if len(folders) > splits else None
        rows.append(Row(path, label, folders[0] if splits else None))
    return rows


def _exists(path: Path) -> bool:
    try:
        return path.exists() or state_of(path) is not None
    except OSError:  # e.g. a name that is too long
        return False


def rows_digest(table: ImageTable, *, times: bool = False) -> str:
    """Compute a SHA-256 over names, labels, boxes with scores, backgrounds, and the sizes of image and mask files.

    Args:
        table: the rows.
        times: whether to include modification times, for results that are invalid after any change to a file.
    """
    digest = hashlib.sha256()
    for name, row in zip(table.names(), table.rows):
        values = [name, row.label, *_state_of(row, times)]
        if row.background is not None:
            values += [str(row.background.path), *_state_of(row.background, times)]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


def _state_of(row: Row, times: bool) -> list[Any]:
    def state(path: Path | None) -> list[int]:
        found = None if path is None else state_of(path)
        return [] if found is None else [*found] if times else [found[0]]

    entry = asdict(row.entry) if row.entry else None
    return [state(row.path), entry, str(row.mask_file), state(row.mask_file)]

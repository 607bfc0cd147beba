"""A user's folder as a table: one row an image, with its label, split, boxes and other columns."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..box_files import BoxEntry, entries_of_rows, read_boxes, read_rows
from ..errors import L2R2Error
from ..images import is_image_path

METADATA = ("metadata.csv", "metadata.jsonl")
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True)
class Row:
    """One item of a data set: its image, what it shows, where the object is (`entry`), and its other columns.

    `background` is another row on whose object-free background the object is to be laid, see `sample_of` and `swap.swapped`.
    """

    path: Path
    label: str | None = None
    split: str | None = None
    entry: BoxEntry | None = None
    mask_file: Path | None = None
    columns: tuple[tuple[str, str], ...] = ()
    background: Row | None = None

    def may_have_object(self, box_threshold: float) -> bool:
        """Whether a mask, or a box of at least this score, is named; whether it lies in the image shows when it is decoded."""
        return self.mask_file is not None if self.entry is None else any(s >= box_threshold for s in self.entry.scores)


@dataclass(frozen=True)
class ImageTable:
    """Images of one data set in a fixed order."""

    root: Path
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.split for row in self.rows if row.split))

    def of_split(self, name: str) -> ImageTable:
        """The rows of one split.

        Raises:
            L2R2Error: no row belongs to it.
        """
        rows = tuple(row for row in self.rows if row.split == name)
        if not rows:
            known = f"it has {', '.join(self.splits)}" if self.splits else "it has no splits"
            raise L2R2Error(f'{self.root}: no image of split "{name}"; {known}.')
        return replace(self, rows=rows)

    def of_names(self, names: Iterable[str]) -> ImageTable:
        """The rows whose path relative to the root is among `names`."""
        wanted = set(names)
        return replace(self, rows=tuple(row for name, row in zip(self.names(), self.rows) if name in wanted))

    def column(self, name: str) -> list[str]:
        """The values of a metadata column.

        Raises:
            L2R2Error: some row does not have it.
        """
        columns = [dict(row.columns) for row in self.rows]
        if lacking := [row for row, values in zip(self.rows, columns) if name not in values]:
            known = ", ".join(dict(lacking[0].columns)) or "none"
            raise L2R2Error(f'{self.root}: {lacking[0].path.name} has no column "{name}" in the metadata; there are {known}.')
        return [values[name] for values in columns]

    def classes(self) -> tuple[str, ...]:
        """Sorted labels.

        Raises:
            L2R2Error: an image without a label, or fewer than two classes.
        """
        if missing := [row for row in self.rows if not row.label]:
            raise L2R2Error(
                f"{self.root}: {len(missing)} of {len(self.rows)} images have no label, the first is {missing[0].path.name}; "
                "give a `label` column in the metadata, or one folder a class."
            )
        labels = tuple(sorted({str(row.label) for row in self.rows}))
        if len(labels) < 2:
            raise L2R2Error(f'{self.root}: only one class ("{labels[0]}"); a classifier needs two or more.')
        return labels

    def names(self) -> list[str]:
        """The images' paths relative to the root."""
        return [Path(os.path.relpath(row.path, self.root)).as_posix() for row in self.rows]

    def label_counts(self) -> Counter[str]:
        return Counter(str(row.label) for row in self.rows)


def read_table(
    root: str | Path, *, metadata: str | Path | None = None, boxes: str | Path | None = None, missing_ok: bool = False
) -> ImageTable:
    """Read a data set.

    Known forms: an `imagefolder` with metadata.csv or .jsonl (columns file_name, label, and if there split, box columns as
    `box_files.entries_of_rows` knows them, mask_file); one folder a class, where the first folder is the class; the latter
    inside folders train, val, test.

    Args:
        root: the folder.
        metadata: another metadata file for the images of that folder; file names stay relative to the folder.
        boxes: a box file that replaces the boxes of the metadata, joined by path.
        missing_ok: keep rows whose image is missing.

    Raises:
        L2R2Error: nothing usable, a listed image is missing, rows contradict each other, or the boxes belong to no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise L2R2Error(f"{root}: no such folder.")
    listed = Path(metadata) if metadata else next((root / m for m in METADATA if (root / m).exists()), None)
    rows = _rows_of_metadata(root, listed, missing_ok) if listed else _rows_of_folders(root)
    if boxes is not None:
        joined = read_boxes(boxes).join(row.path for row in rows)
        rows = [replace(row, entry=joined.get(str(row.path))) for row in rows]
    return ImageTable(root, tuple(rows))


def _rows_of_metadata(root: Path, file: Path, missing_ok: bool) -> list[Row]:
    if not file.is_file():
        raise L2R2Error(f"{file}: no such metadata file.")
    records = [{**record, "file_name": posixpath.normpath(str(record["file_name"]))} for record in read_rows(file)]
    entries = entries_of_rows(records, str(file))
    has_boxes = any(entry.boxes for entry in entries.values())
    rows: dict[str, Row] = {}
    for record in records:
        name = record["file_name"]
        if not missing_ok and name not in rows and not _exists(root / name):
            raise L2R2Error(f"{file}: lists {name}, which is not in {root}.")
        texts = {k: None if record.get(k) in (None, "") else str(record[k]) for k in ("label", "split", "mask_file")}
        row = Row(
            root / name,
            texts["label"],
            texts["split"],
            entries[name] if has_boxes else None,
            root / texts["mask_file"] if texts["mask_file"] else None,
            tuple((k, str(v)) for k, v in record.items() if isinstance(v, (str, int, float))),
        )
        old = rows.setdefault(name, row)
        for what in ("label", "split", "mask_file"):
            if getattr(old, what) != getattr(row, what):
                raise L2R2Error(f"{file}: gives {name} two values of {what}, {getattr(old, what)} and {getattr(row, what)}.")
    return list(rows.values())


def _rows_of_folders(root: Path) -> list[Row]:
    """The first folder is the class; where every first folder is called like a split, the second one is."""
    paths = sorted(p for p in root.rglob("*") if is_image_path(p.relative_to(root)) and p.is_file())
    if not paths:
        raise L2R2Error(f"{root}: no image in this folder.")
    parents = [path.relative_to(root).parts[:-1] for path in paths]
    splits = all(folders and folders[0].lower() in SPLIT_FOLDERS for folders in parents)
    rows = []
    for path, folders in zip(paths, parents):
        label = folders[splits] if len(folders) > splits else None
        rows.append(Row(path, label, folders[0] if splits else None))
    return rows


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def rows_digest(table: ImageTable, *, times: bool = False) -> str:
    """SHA-256 over names, labels, boxes with their scores, backgrounds, and sizes of images and masks: other data, other digest.

    Args:
        table: the rows.
        times: also over when the files were changed, for what must be computed anew after any change.
    """
    digest = hashlib.sha256()
    for name, row in zip(table.names(), table.rows):
        facts = [name, row.label, *_state_of(row, times)]
        if row.background is not None:
            facts += [str(row.background.path), *_state_of(row.background, times)]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _state_of(row: Row, times: bool) -> list[Any]:
    def state(path: Path | None) -> list[int]:
        if path is None or not path.exists():
            return []
        about = path.stat()
        return [about.st_size, *([about.st_mtime_ns] if times else [])]

    entry = asdict(row.entry) if row.entry else None
    return [state(row.path), entry, str(row.mask_file), state(row.mask_file)]

"""Boxes as Parquet with one row per image, in one file or a folder of files, for data sets whose JSON would take gigabytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import check_readable, pyarrow, write_atomic
from .table import BoxEntry, BoxTable

KEY = b"l2r2"
MANIFEST = "_manifest.json"  # of a folder of partitions; readers of Parquet ignore names with an underscore


def write_parquet(table: BoxTable, path: Path) -> None:
    """Write a table as Parquet, atomically; the columns are those of `arrow_table`, and `info` is stored in the metadata.

    Raises:
        L2R2Error: when the file cannot be written, a name is not UTF-8, or pyarrow is missing.
    """
    _, parquet = pyarrow()
    check_names(path, table.entries)
    rows = arrow_table(table.entries, table.stamps).replace_schema_metadata({KEY: json.dumps(table.info).encode()})
    write_atomic(path, lambda temporary: parquet.write_table(rows, temporary))


def arrow_table(entries: Mapping[str, BoxEntry], stamps: Mapping[str, str]) -> Any:
    """Return entries as an Arrow table.

    The columns are file, width, height, normalized, failure, stamp, boxes (xyxy), scores, labels and masks (COCO RLE).
    """
    pa, _ = pyarrow()
    mask = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    lists = {
        "boxes": pa.list_(pa.list_(pa.float64())),
        "scores": pa.list_(pa.float64()),
        "labels": pa.list_(pa.string()),
        "masks": pa.list_(mask),
    }
    fields = {
        "file": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "normalized": pa.bool_(),
        "failure": pa.string(),
        "stamp": pa.string(),
    }
    records = [{**record_of(file, entry), "stamp": stamps.get(file)} for file, entry in entries.items()]
    return pa.Table.from_pylist(records, pa.schema([*fields.items(), *lists.items()]))


def record_of(file: str, entry: BoxEntry) -> dict[str, Any]:
    """Convert an entry to plain values; `read.entry_of` is the inverse."""
    height, width = entry.image_size or (None, None)
    masks = [None if m is None else m.to_coco() for m in entry.masks]
    return {
        "file": file,
        "width": width,
        "height": height,
        "normalized": entry.normalized,
        "failure": entry.failure,
        "boxes": entry.boxes,
        "scores": entry.scores,
        "labels": entry.labels,
        "masks": masks,
    }


def check_names(path: Path, names: Iterable[str]) -> None:
    """Check that all names are UTF-8, as Parquet requires; a file name may be any bytes.

    Raises:
        L2R2Error: when a name is not UTF-8.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise L2R2Error(f"{path}: Parquet cannot store {name!r}, which is not UTF-8; rename it, or write .json.") from None


def read_parquet(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read the rows and `info` of a file from `write_parquet`, or of a folder of such files with a manifest.

    Raises:
        L2R2Error: when the file is not such Parquet, the folder is not complete, or pyarrow is missing.
    """
    if not path.is_dir():
        return _read_file(path)
    manifest = path / MANIFEST
    check_readable(manifest, most=None)
    try:
        info, names = manifest_of(manifest.read_bytes(), str(path))
    except OSError as error:
        raise L2R2Error(f"{manifest}: cannot be read ({error.strerror or error}).") from error
    if lost := next((name for name in names if not (path / name).is_file()), None):
        raise L2R2Error(f"{path / lost}: is missing; run the same command again.")
    return [row for name in names for row in _read_file(path / name)[0]], info


def _read_file(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    pa, parquet = pyarrow()
    check_readable(path, most=None)
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"{path}: is not readable Parquet ({' '.join(str(error).split())[:200]}).") from error
    ours = (table.schema.metadata or {}).get(KEY)
    if ours is None or "boxes" not in table.column_names:
        raise L2R2Error(f"{path}: is not a box file of `l2r2 localize`; other Parquet files are not supported.")
    return table.to_pylist(), json.loads(ours)


def manifest_of(text: bytes, folder: str, *, finished: bool = True) -> tuple[Any, list[str]]:
    """Parse the manifest of a folder of partitions.

    Args:
        text: its content.
        folder: name of the folder, for messages.
        finished: refuse a folder that is not complete.

    Returns:
        The settings that the rows were made with, and the names of the partitions in the order of the images.

    Raises:
        L2R2Error: when it is damaged, or the folder is not complete.
    """
    try:
        found = json.loads(text)
        header, names, complete = found["header"], found["partitions"], found["complete"]
        if not isinstance(header, dict) or not isinstance(names, list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise L2R2Error(f"{folder}/{MANIFEST}: is damaged; remove the folder or choose another -o.") from None
    if finished and not complete:
        raise L2R2Error(f"{folder}: is not complete; run the same command again.")
    return header, [str(name) for name in names]

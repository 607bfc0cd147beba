"""Boxes as one Parquet file with one row per image, for data sets whose JSON would take gigabytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import check_readable, write_atomic
from .table import BoxEntry, BoxTable

KEY = b"l2r2"
INSTALL = 'Parquet needs pyarrow: pip install "l2r2-models[detect]".'


def write_parquet(table: BoxTable, path: Path) -> None:
    """Write a table as Parquet, atomically.

    The columns are file, width, height, normalized, failure, stamp, boxes (xyxy), scores, labels and masks (COCO RLE); `info` is
    stored in the schema's metadata.

    Raises:
        L2R2Error: when the file cannot be written, a name is not UTF-8, or pyarrow is missing.
    """
    pa, parquet = pyarrow()
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
    schema = pa.schema([*fields.items(), *lists.items()], metadata={KEY: json.dumps(table.info).encode()})
    check_names(path, table.entries)
    records = [{**record_of(file, entry), "stamp": table.stamps.get(file)} for file, entry in table.entries.items()]
    write_atomic(path, lambda temporary: parquet.write_table(pa.Table.from_pylist(records, schema), temporary))


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
    """Read the rows and `info` of a file from `write_parquet`.

    Raises:
        L2R2Error: when the file is not such Parquet, or pyarrow is missing.
    """
    pa, parquet = pyarrow()
    check_readable(path, most=None)
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"{path}: is not readable Parquet ({' '.join(str(error).split())[:200]}).") from error
    ours = (table.schema.metadata or {}).get(KEY)
    if ours is None:
        raise L2R2Error(f"{path}: is not a box file of `l2r2 localize`; other Parquet files are not supported.")
    return table.to_pylist(), json.loads(ours)


def pyarrow() -> tuple[Any, Any]:
    """Import `pyarrow` and `pyarrow.parquet`.

    Raises:
        L2R2Error: when pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise L2R2Error(INSTALL) from error
    return pa, parquet

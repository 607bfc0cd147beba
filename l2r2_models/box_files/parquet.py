"""A table of boxes as one Parquet file: one row an image, for data sets whose JSON would be gigabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..files import check_readable, write_atomic
from .table import BoxTable

KEY = b"l2r2"
INSTALL = 'Parquet needs pyarrow: pip install "l2r2-models[detect]".'


def write_parquet(table: BoxTable, path: Path) -> None:
    """Columns file, width, height, normalised, failure, boxes (xyxy), scores, labels, masks (COCO RLE); `info` in the schema.

    Raises:
        L2R2Error: not writable, or pyarrow is missing.
    """
    pa, parquet = _pyarrow()
    mask = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    lists = {"boxes": pa.list_(pa.list_(pa.float64())), "scores": pa.list_(pa.float64()), "labels": pa.list_(pa.string()),
             "masks": pa.list_(mask)}  # fmt: skip
    fields = {"file": pa.string(), "width": pa.int32(), "height": pa.int32(), "normalised": pa.bool_(), "failure": pa.string()}
    schema = pa.schema([*fields.items(), *lists.items()], metadata={KEY: json.dumps(table.info).encode()})
    records = []
    for file, entry in table.entries.items():
        height, width = entry.image_size or (None, None)
        masks = [None if m is None else m.to_coco() for m in entry.masks]
        records.append({"file": file, "width": width, "height": height, "normalised": entry.normalised, "failure": entry.failure,
                        "boxes": entry.boxes, "scores": entry.scores, "labels": entry.labels, "masks": masks})  # fmt: skip
    write_atomic(path, lambda temporary: parquet.write_table(pa.Table.from_pylist(records, schema), temporary))


def read_parquet(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and `info` of a file of `write_parquet`.

    Raises:
        L2R2Error: not Parquet, other columns, or pyarrow is missing.
    """
    pa, parquet = _pyarrow()
    check_readable(path, most=None)
    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"{path}: is not readable Parquet ({' '.join(str(error).split())[:200]}).") from error
    ours = (table.schema.metadata or {}).get(KEY)
    if ours is None:
        raise L2R2Error(f"{path}: is not a box file of `l2r2 localize`; Parquet of others is not known here.")
    return table.to_pylist(), json.loads(ours)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise L2R2Error(INSTALL) from error
    return pa, parquet

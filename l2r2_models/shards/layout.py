"""The layout of shards: suffixes, names, and the columns of Parquet."""

from __future__ import annotations

import posixpath
from typing import Any

from ..errors import L2R2Error
from ..io import pyarrow

SUFFIXES = (".tar", ".parquet")
MASK = ".mask.png"  # member of a tar with the mask of an image: a.mask.png beside a.jpg
OF_MASK = "/mask"  # what the name of an image in Parquet is extended by to name its mask
BYTES, NAMES = ("image", "bytes", "jpg", "jpeg", "png"), ("path", "file", "file_name", "__key__", "id")
MASKS = ("mask", "segmentation_mask", "segmentation", "annotation")  # columns


def inside(name: str) -> str:
    """Return the name of a member as a relative path without `.` and `..`.

    >>> inside("./cam/1.jpg"), inside("/data/1.jpg")
    ('cam/1.jpg', 'data/1.jpg')
    """
    return posixpath.normpath(f"/{name}").lstrip("/")


def name_of_row(value: Any, number: int) -> str:
    """Return the name of an image in Parquet: that of its row, or else the number of the row."""
    return (inside(str(value)) if value is not None else "") or str(number)


def encoded(value: Any) -> bytes | None:
    """Return the encoded image of a Parquet value, `{bytes, path}` or bytes; None if it holds none."""
    data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return data


def is_tar(shard: str) -> bool:
    """Whether a shard is a tar by its suffix, and not Parquet."""
    return shard.lower().endswith(".tar")


def opened(shard: str) -> Any:
    """Open a Parquet shard as `pyarrow.parquet.ParquetFile`.

    Raises:
        L2R2Error: when it is damaged, or pyarrow is missing.
    """
    pa, parquet = pyarrow()
    try:
        return parquet.ParquetFile(shard)
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"{shard}: is damaged or no Parquet file ({' '.join(str(error).split())[:200]}).") from None


def columns_of(schema: Any, name: str) -> tuple[str, str | None]:
    """Return the columns of a Parquet schema with the encoded images and, if there is one, with their names.

    Raises:
        L2R2Error: when no column holds encoded images.
    """
    column = next((c for c in BYTES if _holds_images(schema, c)), None)
    if column is None:
        raise L2R2Error(f"{name}: has no column of encoded images; name it {', '.join(BYTES[:-1])} or {BYTES[-1]}.")
    return column, next((c for c in NAMES if c in schema.names), None)


def mask_column(schema: Any) -> str | None:
    """Return the column of a Parquet schema with the encoded masks, or None."""
    return next((c for c in MASKS if _holds_images(schema, c)), None)


def _holds_images(schema: Any, column: str) -> bool:
    pa, _ = pyarrow()
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def largest_row_group(shard: str) -> int:
    """Return the bytes of the largest row group of a Parquet shard; 0 for a tar, which has none."""
    if is_tar(shard):
        return 0
    metadata = opened(shard).metadata
    return max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)

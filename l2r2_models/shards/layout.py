"""The layout of shards: suffixes, names, and the columns of Parquet."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable
from typing import Any

from ..errors import L2R2Error
from ..io import MAX_BYTES, pyarrow

BLOCK = 512  # a tar ends with blocks of zeros
SUFFIXES = (".tar", ".parquet")
MASK = ".mask.png"  # member of a tar with the mask of an image: a.mask.png beside a.jpg
OF_MASK = "/mask"  # what the name of an image in Parquet is extended by to name its mask
TOO_LARGE = f"is larger than the limit of {MAX_BYTES / 2**20:,.0f} MB; use a smaller file."
BYTES, NAMES = ("image", "bytes", "jpg", "jpeg", "png"), ("path", "file", "file_name", "__key__", "id")
MASKS = ("mask", "segmentation_mask", "segmentation", "annotation")  # columns


def inside(name: str) -> str:
    """Return the name of a member as a relative path without `.` and `..`.

    >>> inside("./cam/1.jpg"), inside("/data/1.jpg")
    ('cam/1.jpg', 'data/1.jpg')
    """
    return posixpath.normpath(f"/{name}").lstrip("/")


class Header(tarfile.TarInfo):
    """A header of a tar; `tarfile` itself takes one that is damaged or missing for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        """Raise `ReadError` for anything but a header, or the zeros at the end."""
        if len(buf) < BLOCK:
            raise tarfile.ReadError("there is no end of the archive")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


def check_end(read: Callable[[int], bytes]) -> None:
    """Check that only zeros follow the end of a tar, by reading the rest.

    Raises:
        ReadError: when something else does, such as another archive.
    """
    while rest := read(2**20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is more after its end; if these are several archives in one file, pack them as one")


def names_of_rows(file: Any, image: str, named: str | None) -> list[str]:
    """Return the names of the images in a `ParquetFile`: those of its rows, or their numbers if a name is there twice.

    Args:
        file: the file.
        image, named: see `columns_of`.
    """
    if not named and not _has_paths(file.schema_arrow, image):
        return [str(number) for number in range(file.metadata.num_rows)]
    names: list[str] = []
    for group in range(file.num_row_groups):
        for row in file.read_row_group(group, [named or f"{image}.path"]).to_pylist():  # without the bytes
            value = row[named] if named else (row.get(image) or {}).get("path")
            names.append((inside(str(value)) if value is not None else "") or str(len(names)))
    return names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]


def _has_paths(schema: Any, image: str) -> bool:
    pa, _ = pyarrow()
    kind = schema.field(image).type
    return bool(pa.types.is_struct(kind)) and any(kind.field(i).name == "path" for i in range(kind.num_fields))


def check_row_group(metadata: Any, group: int, column: str, most: int | None = None) -> None:
    """Refuse a row group whose images are too large, by the metadata of the Parquet file and before it is read.

    Args:
        metadata: of the file.
        group: number of the row group.
        column: the column of images.
        most: maximum size in bytes; None for no limit but that of its images.

    Raises:
        L2R2Error: when the row group, or an image in it, is larger.
    """
    about = metadata.row_group(group)
    chunks = [about.column(i) for i in range(about.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
    if size > (about.num_rows + 1) * MAX_BYTES:
        raise L2R2Error(TOO_LARGE)
    if most is not None and size > most:
        raise L2R2Error(
            f"its row group is {size / 2**20:,.0f} MB, over the limit of {most / 2**20:,.0f} MB; write the Parquet file with a "
            "smaller row_group_size, such as 16."
        )


def encoded(value: Any) -> bytes | None:
    """Return the encoded image of a Parquet value, `{bytes, path}` or bytes; None if it holds none.

    Raises:
        L2R2Error: when it is larger than `MAX_BYTES`.
    """
    data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    if data is not None and len(data) > MAX_BYTES:
        raise L2R2Error(TOO_LARGE)
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
        raise L2R2Error(f"{shard}: is damaged or not a Parquet file ({' '.join(str(error).split())[:200]}).") from None


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

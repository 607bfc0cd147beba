"""Images in shards: WebDataset (.tar), and Parquet with a column of encoded images. A shard is read once, from front to back."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..boxes.parquet import pyarrow
from ..errors import L2R2Error
from ..images import is_image_path
from ..io import MAX_BYTES
from .places import Place

SUFFIXES = (".tar", ".parquet")
BYTES, NAMES = ("image", "bytes", "jpg", "jpeg", "png"), ("path", "file", "file_name", "__key__", "id")
ROWS = 16  # Parquet rows read at once; more would hold more encoded images


def images_of_shard(name: str, place: Place) -> Iterator[tuple[str, bytes | str]]:
    """Yield name and content of each image in a shard; instead of the content, the message for one that cannot be read.

    A shard that is damaged yields one such message under its own name, after the images before the damage.
    """
    pa, _ = pyarrow()
    try:
        yield from _of_parquet(name, place) if name.lower().endswith(".parquet") else _of_tar(name, place)
    except L2R2Error as error:
        yield name, str(error)
    except (OSError, EOFError, ValueError, tarfile.TarError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        yield name, f"{name}: cannot be read further ({why}); the shard is damaged or truncated."


def _of_tar(name: str, place: Place) -> Iterator[tuple[str, bytes | str]]:
    with place.filesystem.open_input_stream(place.path) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            if not is_image_path(Path(member.name)):
                continue
            inside = f"{name}/{member.name}"
            if not member.isreg():
                yield inside, f"{inside}: is not a regular file; pack the image itself."
            elif member.size > MAX_BYTES:
                yield inside, f"{inside}: is larger than the limit of {MAX_BYTES / 2**20:,.0f} MB; use a smaller file."
            else:
                content = archive.extractfile(member)
                assert content is not None  # a regular file
                yield inside, content.read()


def _of_parquet(name: str, place: Place) -> Iterator[tuple[str, bytes | str]]:
    _, parquet = pyarrow()
    with place.filesystem.open_input_file(place.path) as stream:
        file = parquet.ParquetFile(stream)
        column, named = columns_of(file.schema_arrow, name)
        number = 0
        for batch in file.iter_batches(ROWS, columns=[column, *([named] if named else [])]):
            for row in batch.to_pylist():
                value = row[column]
                own, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (None, value)
                label = row[named] if named else own
                inside = f"{name}/{number if label is None else label}"
                yield inside, data if data is not None else f"{inside}: has no image in this row."
                number += 1


def columns_of(schema: Any, name: str) -> tuple[str, str | None]:
    """Return the columns of a Parquet schema with the encoded images and, if there is one, with their names.

    Raises:
        L2R2Error: when no column holds encoded images.
    """
    pa, _ = pyarrow()

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    column = next((c for c in BYTES if c in schema.names and holds_images(schema.field(c).type)), None)
    if column is None:
        raise L2R2Error(f"{name}: has no column of encoded images; name it {', '.join(BYTES[:-1])} or {BYTES[-1]}.")
    return column, next((c for c in NAMES if c in schema.names), None)

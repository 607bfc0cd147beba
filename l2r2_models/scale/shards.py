"""Images in shards: WebDataset (.tar), and Parquet with a column of encoded images. A shard is read once, from front to back."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..images import is_image_path
from ..io import MAX_BYTES, pyarrow
from ..shards import MASK, Header, check_end, check_row_group, columns_of, encoded, inside, names_of_rows
from .places import Place

ROWS = 16  # Parquet rows read at once; more would hold more encoded images


def images_of_shard(name: str, place: Place) -> Iterator[tuple[str, bytes | str]]:
    """Yield name and content of each image in a shard; instead of the content, the message for one that cannot be read.

    A shard that is damaged yields one such message under its own name, after the images before the damage.
    """
    pa, _ = pyarrow()
    try:
        yield from _of_parquet(name, place) if name.lower().endswith(".parquet") else _of_tar(name, place)
    except L2R2Error as error:
        yield name, str(error) if str(error).startswith(name) else f"{name}: {error}"
    except (OSError, EOFError, ValueError, tarfile.TarError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        yield name, f"{name}: cannot be read further ({why}); the shard is damaged or truncated."


def _of_tar(name: str, place: Place) -> Iterator[tuple[str, bytes | str]]:
    with (
        place.filesystem.open_input_stream(place.path) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header) as archive,
    ):
        for member in archive:
            if not is_image_path(Path(member.name)) or member.name.lower().endswith(MASK):
                continue
            image = f"{name}/{inside(member.name)}"
            if not member.isreg():
                yield image, f"{image}: is not a regular file; pack the image itself."
            elif member.size > MAX_BYTES:
                yield image, f"{image}: is larger than the limit of {MAX_BYTES / 2**20:,.0f} MB; use a smaller file."
            else:
                content = archive.extractfile(member)
                assert content is not None  # a regular file
                yield image, content.read()
        end: Any = archive.fileobj
        check_end(end.read)


def _of_parquet(name: str, place: Place) -> Iterator[tuple[str, bytes | str]]:
    _, parquet = pyarrow()
    with place.filesystem.open_input_file(place.path) as stream:
        file = parquet.ParquetFile(stream)
        column, named = columns_of(file.schema_arrow, name)
        for group in range(file.num_row_groups):
            check_row_group(file.metadata, group, column)
        names = iter(names_of_rows(file, column, named))
        for batch in file.iter_batches(ROWS, columns=[column]):
            for row in batch.to_pylist():
                image = f"{name}/{next(names)}"
                try:
                    data = encoded(row[column])
                except L2R2Error as error:
                    yield image, f"{image}: {error}"
                else:
                    yield image, data if data is not None else f"{image}: has no image in this row."

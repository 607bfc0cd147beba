"""Reading images in shards by path."""

from __future__ import annotations

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import MAX_BYTES, pyarrow
from .index import Index, State, index_of
from .layout import OF_MASK, TOO_LARGE, check_row_group, columns_of, encoded, is_tar, mask_column, opened

MAX_GROUP = 4 * MAX_BYTES  # limit for the images of a row group, which are in memory at once
THROUGH = re.compile(r"\.(tar|parquet)/", re.IGNORECASE)
_locks = tuple(threading.Lock() for _ in range(16))


def shard_of(path: str | Path) -> tuple[str, str] | None:
    """Return the shard that a path goes through and the name of the member; None if it is the path of a file or folder.

    >>> shard_of("photos/a.jpg") is None
    True
    """
    text = Path(path).as_posix()
    for match in THROUGH.finditer(text):
        if os.path.isfile(shard := text[: match.end() - 1]):
            return shard, text[match.end() :]
    return None


def state_of(path: str | Path | None) -> State | None:
    """Return size in bytes and modification time in nanoseconds of a file or a member of a shard; None if there is none.

    The size of an image in Parquet is that of its row group, and the time is that of the shard.
    """
    if path is None:
        return None
    try:
        if (place := shard_of(path)) is None:
            about = os.stat(path)
            return about.st_size, about.st_mtime_ns
        shard, name = place
        index = index_of(shard)
        if (found := index.find(name)) is None:
            return None
        first, size = found
        if not is_tar(shard):
            _check_state(os.stat(shard), index.state)
            size = _footer(shard, index.state)[0].row_group(first).total_byte_size
    except (OSError, ValueError, L2R2Error):
        return None
    return size, index.state[1]


def read(path: str | Path) -> bytes | None:
    """Return the encoded image at a path inside a shard; None if the path does not go through one.

    Raises:
        L2R2Error: when it cannot be read, or the shard has changed since this process first read it.
    """
    if (place := shard_of(path)) is None:
        return None
    shard, name = place
    index = index_of(shard)
    if (found := index.find(name)) is None:
        raise L2R2Error(f"{path}: no such image in the shard.")
    try:
        data = _from_tar(shard, index, *found) if is_tar(shard) else _from_parquet(shard, name, index, *found)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be read ({error.strerror or error}).") from None
    except L2R2Error as error:
        raise L2R2Error(f"{path}: {error}") from None
    return data


def _from_tar(shard: str, index: Index, start: int, size: int) -> bytes:
    if start < 0:
        raise L2R2Error("is not a regular file; pack the image itself.")
    if size > MAX_BYTES:
        raise L2R2Error(TOO_LARGE)
    with open(shard, "rb") as file:
        _check_state(os.fstat(file.fileno()), index.state)
        file.seek(start)
        return file.read(size)


def _from_parquet(shard: str, name: str, index: Index, group: int, row: int) -> bytes:
    _check_state(os.stat(shard), index.state)
    _, image, mask = _footer(shard, index.state)
    of_mask = mask is not None and name.endswith(OF_MASK) and index.find(name.removesuffix(OF_MASK)) is not None
    column = (of_mask and mask) or image
    with _locks[hash((shard, group, column)) % len(_locks)]:  # else each thread that waits for a group would read it
        rows = _group(shard, index.state, group, column)
    data = encoded(rows[row].as_py())
    if data is None:
        raise L2R2Error("has no image in this row.")
    return data


def _check_state(found: os.stat_result, state: State) -> None:
    if (found.st_size, found.st_mtime_ns) != state:
        raise L2R2Error("the shard has changed since this command first read it; start the command again.")


@functools.lru_cache(maxsize=256)
def _footer(shard: str, state: State) -> tuple[Any, str, str | None]:
    """Return the metadata of a Parquet file, and its columns of images and of masks; `state` only identifies the content."""
    file = opened(shard)
    image, _ = columns_of(file.schema_arrow, shard)
    return file.metadata, image, mask_column(file.schema_arrow)


@functools.lru_cache(maxsize=2)  # consecutive images share a row group
def _group(shard: str, state: State, group: int, column: str) -> Any:
    """Return the images `[rows]` of a row group."""
    pa, parquet = pyarrow()
    metadata = _footer(shard, state)[0]
    check_row_group(metadata, group, column, MAX_GROUP)
    try:
        return parquet.ParquetFile(shard, metadata=metadata).read_row_group(group, [column], use_threads=False).column(0)
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"its row group is damaged ({' '.join(str(error).split())[:200]}).") from None

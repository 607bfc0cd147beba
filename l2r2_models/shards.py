"""Images in shards, by random access: a path such as `data/train-00000.tar/cam/1.jpg` is read as if it were a file.

A shard is a WebDataset (`.tar`) or a Parquet file with a column of encoded images. It is indexed once, and the index is kept in
the cache of the Hugging Face Hub; from then on, an image in a tar is one seek, and one in Parquet is a read of its row group.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import L2R2Error
from .io import MAX_BYTES, pyarrow, write_atomic

SUFFIXES = (".tar", ".parquet")
SIDECARS = (".json", ".cls")  # members of a tar that describe the image of their name
MASK = ".mask.png"  # member of a tar with the mask of an image: a.mask.png beside a.jpg
OF_MASK = "/mask"  # what the name of an image in Parquet is extended by to name its mask
BYTES, NAMES = ("image", "bytes", "jpg", "jpeg", "png"), ("path", "file", "file_name", "__key__", "id")
MASKS = ("mask", "segmentation_mask", "segmentation", "annotation")  # columns
FORMAT = 1  # of the index; increase it when its content changes
BLOCK = 512  # a tar ends with blocks of zeros
TWICE = "is in the shard twice; write the shard again, with a name of its own for each image."
PACK_AGAIN = "copy it again, or pack it again without compression."
State = tuple[int, int]  # size in bytes, and modification time in nanoseconds


class Index(NamedTuple):
    """Where the members of a shard are.

    Attributes:
        names: `[N]` names as bytes, sorted.
        first: `[N]` position in the tar (-1: not a regular file), or row group.
        second: `[N]` size in the tar, or row in the group.
        state: state of the shard.
    """

    names: np.ndarray
    first: np.ndarray
    second: np.ndarray
    state: State

    def find(self, name: str) -> tuple[int, int] | None:
        """Return `first` and `second` of a member; None if there is none of this name."""
        wanted = os.fsencode(name)
        if not len(self.names) or len(wanted) > self.names.itemsize:
            return None
        i = int(np.searchsorted(self.names, np.array(wanted, self.names.dtype)))
        if i == len(self.names) or self.names[i] != wanted:
            return None
        return int(self.first[i]), int(self.second[i])


class Member(NamedTuple):
    """A member of a shard, with the texts of the members of a tar that describe it, or None: `a.json` and `a.cls` of `a.jpg`."""

    name: str
    json: str | None
    label: str | None


def shard_of(path: str | Path) -> tuple[str, str] | None:
    """Return the shard that a path goes through and the name of the member; None if it is the path of a file or folder.

    >>> shard_of("photos/a.jpg") is None
    True
    """
    text = Path(path).as_posix()
    lower = text.lower()
    for suffix in SUFFIXES:
        end = lower.find(f"{suffix}/")
        while end >= 0:
            shard = text[: end + len(suffix)]
            if os.path.isfile(shard):
                return shard, text[len(shard) + 1 :]
            end = lower.find(f"{suffix}/", end + 1)
    return None


def inside(name: str) -> str:
    """Return the name of a member as a relative path without `.` and `..`.

    >>> inside("./cam/1.jpg"), inside("/data/1.jpg")
    ('cam/1.jpg', 'data/1.jpg')
    """
    return posixpath.normpath(f"/{name}").lstrip("/")


def shards_in(folder: Path) -> list[Path]:
    """List the shards in a folder and below, sorted, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


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
    except (OSError, ValueError, L2R2Error):
        return None
    if (found := index.find(name)) is None:
        return None
    first, second = found
    size = second if _is_tar(shard) else _footer(shard, index.state)[0].row_group(first).total_byte_size
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
        data = _from_tar(shard, index, *found) if _is_tar(shard) else _from_parquet(shard, name, index, *found)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be read ({error.strerror or error}).") from None
    except L2R2Error as error:
        raise L2R2Error(f"{path}: {error}") from None
    return data


def _from_tar(shard: str, index: Index, start: int, size: int) -> bytes:
    if start < 0:
        raise L2R2Error("is not a regular file; pack the image itself.")
    if size > MAX_BYTES:
        raise L2R2Error(f"is larger than the limit of {MAX_BYTES / 2**20:,.0f} MB; use a smaller file.")
    with open(shard, "rb") as file:
        _check_state(os.fstat(file.fileno()), index.state)
        file.seek(start)
        return file.read(size)


def _from_parquet(shard: str, name: str, index: Index, group: int, row: int) -> bytes:
    _check_state(os.stat(shard), index.state)
    _, image, mask = _footer(shard, index.state)
    of_mask = mask is not None and name.endswith(OF_MASK) and index.find(name.removesuffix(OF_MASK)) is not None
    data = encoded(_group(shard, index.state, group, (of_mask and mask) or image)[row].as_py())
    if data is None:
        raise L2R2Error("has no image in this row.")
    return data


def _is_tar(shard: str) -> bool:
    return shard.lower().endswith(".tar")


def _check_state(found: os.stat_result, state: State) -> None:
    if (found.st_size, found.st_mtime_ns) != state:
        raise L2R2Error("the shard has changed since this command first read it; start the command again.")


@functools.lru_cache(maxsize=256)
def _footer(shard: str, state: State) -> tuple[Any, str, str | None]:
    """Return the metadata of a Parquet file, and its columns of images and of masks; `state` only identifies the content."""
    file = _opened(shard)
    image, _ = columns_of(file.schema_arrow, shard)
    return file.metadata, image, mask_column(file.schema_arrow)


@functools.lru_cache(maxsize=2)  # consecutive images share a row group
def _group(shard: str, state: State, group: int, column: str) -> Any:
    """Return the images `[rows]` of a row group."""
    pa, parquet = pyarrow()
    metadata = _footer(shard, state)[0]
    try:
        return parquet.ParquetFile(shard, metadata=metadata).read_row_group(group, [column], use_threads=False).column(0)
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"its row group is damaged ({' '.join(str(error).split())[:200]}).") from None


def _opened(shard: str) -> Any:
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


_indexes: dict[str, Index] = {}


def index_of(shard: str) -> Index:
    """Return the index of a shard: the one that this process has, or else that of the cache, or a new one.

    Raises:
        L2R2Error: when the shard is damaged, or two members share a name.
    """
    if (known := _indexes.get(shard)) is None:
        known = _indexes[shard] = indexed_now(shard)[0]
    return known


def members_of(shard: str) -> Iterator[Member]:
    """Yield the members of a shard as it is now, in its order; this process reads it by this index from then on.

    Raises:
        L2R2Error: when the shard is damaged, or two members share a name.
    """
    index, file = indexed_now(shard)
    _indexes[shard] = index
    with np.load(file, allow_pickle=False) as stored:
        order, texts = stored["order"], json.loads(stored["texts"].tobytes())
    for i, text in zip(order, texts or [(None, None)] * len(order)):
        yield Member(os.fsdecode(bytes(index.names[i])), *text)


def indexed_now(shard: str) -> tuple[Index, Path]:
    """Return the index of a shard as it is now, and its file in the cache, written now if the shard is new or has changed.

    Raises:
        L2R2Error: when the shard is damaged, or two members share a name.
    """
    from huggingface_hub import constants

    try:
        about = os.stat(shard)
    except OSError as error:
        raise L2R2Error(f"{shard}: cannot be read ({error.strerror or error}).") from None
    state = (about.st_size, about.st_mtime_ns)
    name = hashlib.sha256(os.path.abspath(shard).encode(errors="surrogateescape")).hexdigest()[:24]
    file = Path(constants.HF_HOME) / "l2r2" / "shards" / f"{name}.npz"
    if (found := _stored(file, state)) is None:
        arrays = _built(shard, state)
        write_atomic(file, lambda temporary: _save(temporary, arrays))
        found = _stored(file, state)
    if found is None:
        raise L2R2Error(f"{file}: cannot be read after it was written; check the disk.")
    return found, file


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(file, "wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _stored(file: Path, state: State) -> Index | None:
    """Read an index from the cache; None if there is none of this state."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            if stored["about"].tolist() != [FORMAT, *state]:
                return None
            return Index(stored["names"], stored["first"], stored["second"], state)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _built(shard: str, state: State) -> dict[str, np.ndarray]:
    """Index a shard, see `Index`; with the `order` of its members, and the `texts` of their sidecars."""
    try:
        found, texts = _of_tar(shard) if _is_tar(shard) else _of_parquet(shard)
    except OSError as error:
        raise L2R2Error(f"{shard}: cannot be read ({error.strerror or error}).") from None
    names = [os.fsencode(name) for name, *_ in found]
    order = sorted(range(len(names)), key=names.__getitem__)
    if twice := next((found[one][0] for one, other in itertools.pairwise(order) if names[one] == names[other]), None):
        raise L2R2Error(f"{shard}/{twice}: {TWICE}")
    places = np.array([place for _, *place in found], np.int64).reshape(-1, 2)[order]
    return {
        "about": np.array([FORMAT, *state], np.int64),
        "names": np.array([names[i] for i in order], np.bytes_),
        "first": places[:, 0].copy(),
        "second": places[:, 1].copy(),
        "order": np.argsort(order),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
    }


def _of_tar(shard: str) -> tuple[list[tuple[str, int, int]], list[tuple[str | None, str | None]]]:
    """Return name, position and size of each member of a tar, and the texts of its sidecars."""
    found: list[tuple[str, int, int]] = []
    sidecars: dict[str, str] = {}
    with open(shard, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    if member.isdir():
                        continue
                    name = inside(member.name)
                    if name.lower().endswith(SIDECARS):
                        if name in sidecars:
                            raise L2R2Error(f"{shard}/{name}: {TWICE}")
                        sidecars[name] = _text(archive, member, f"{shard}/{name}")
                    else:
                        plain = member.isreg() and not member.issparse()
                        found.append((name, member.offset_data if plain else -1, member.size))
                end = archive.offset
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise L2R2Error(f"{shard}: {_after(found)}({' '.join(str(error).split())[:200]}); {PACK_AGAIN}") from None
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):  # where tarfile stops without an error
            raise L2R2Error(f"{shard}: {_after(found)}; {PACK_AGAIN}")
    texts = []
    for name, *_ in found:
        stem = posixpath.splitext(name)[0]
        texts.append((sidecars.get(f"{stem}.json"), sidecars.get(f"{stem}.cls")))
    return found, texts


def _after(found: Sequence[tuple[str, int, int]]) -> str:
    return f"is damaged or truncated after {found[-1][0]}" if found else "is no tar file that can be read by position"


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str:
    if not member.isreg() or member.size > MAX_BYTES:
        raise L2R2Error(f"{name}: is not a regular file, or too large; pack the file itself.")
    content = archive.extractfile(member)
    assert content is not None  # a regular file
    return content.read().decode("utf-8-sig", errors="surrogateescape")


def _of_parquet(shard: str) -> tuple[list[tuple[str, int, int]], list[tuple[str | None, str | None]]]:
    """Return name, row group and row of each image in a Parquet file, and of its masks; it has no sidecars."""
    pa, _ = pyarrow()
    file = _opened(shard)
    image, named = columns_of(file.schema_arrow, shard)
    mask = mask_column(file.schema_arrow)
    found: list[tuple[str, int, int]] = []
    number = 0
    try:
        for group in range(file.num_row_groups):
            own = [] if named else [f"{image}.path"]  # without the bytes
            rows = file.read_row_group(group, [*([named] if named else own), *([mask] if mask else [])]).to_pylist()
            for row, values in enumerate(rows or [{}] * file.metadata.row_group(group).num_rows):
                name = name_of_row(values.get(named) if named else (values.get(image) or {}).get("path"), number)
                found.append((name, group, row))
                if mask and encoded(values[mask]) is not None:
                    found.append((name + OF_MASK, group, row))
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"{shard}: is damaged or truncated ({' '.join(str(error).split())[:200]}).") from None
    return found, []


def name_of_row(value: Any, number: int) -> str:
    """Return the name of an image in Parquet: that of its row, or else the number of the row."""
    return (inside(str(value)) if value is not None else "") or str(number)


def encoded(value: Any) -> bytes | None:
    """Return the encoded image of a Parquet value, `{bytes, path}` or bytes; None if it holds none."""
    data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    return data

"""The index of a shard, which says where its members are: made once, and kept in the cache of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import L2R2Error
from ..io import MAX_BYTES, pyarrow, write_atomic
from .layout import OF_MASK, Header, check_end, columns_of, encoded, inside, is_tar, mask_column, names_of_rows, opened

logger = logging.getLogger(__name__)

SIDECARS = (".json", ".cls")  # members of a tar that describe the image of their name
LONGEST = 4096  # bytes of a name, as of a path on Linux; each name in an index takes as much as its longest
FORMAT = 2  # of the index; increase it when its content changes
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


_indexes: dict[str, Index] = {}
_unsaved: dict[str, dict[str, np.ndarray]] = {}  # by shard, where the cache cannot be written
PLACES = ("about", "names", "first", "second")  # arrays of an index
MEMBERS = (*PLACES, "order", "texts")


def index_of(shard: str) -> Index:
    """Return the index of a shard: the one that this process has, or else that of the cache, or a new one.

    Raises:
        L2R2Error: when the shard is damaged, or two members share a name.
    """
    if (known := _indexes.get(shard)) is None:
        known = _indexes[shard] = indexed_now(shard)
    return known


def members_of(shard: str) -> Iterator[Member]:
    """Yield the members of a shard as it is now, in its order; this process reads it by this index from then on.

    Raises:
        L2R2Error: when the shard is damaged, or two members share a name.
    """
    arrays = _arrays_now(shard, MEMBERS)
    _indexes[shard] = index = _index(arrays)
    order, texts = arrays["order"], json.loads(arrays["texts"].tobytes())
    for i, text in zip(order, texts or [(None, None)] * len(order)):
        yield Member(os.fsdecode(bytes(index.names[i])), *text)


def indexed_now(shard: str) -> Index:
    """Return the index of a shard as it is now; it is written to the cache if the shard is new or has changed.

    Raises:
        L2R2Error: when the shard is damaged, or two members share a name.
    """
    return _index(_arrays_now(shard, PLACES))


def _index(arrays: Mapping[str, np.ndarray]) -> Index:
    _, size, time = arrays["about"].tolist()
    return Index(arrays["names"], arrays["first"], arrays["second"], (size, time))


def _arrays_now(shard: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return arrays of the index of a shard as it is now; where the cache cannot be written, the index is kept in memory."""
    from huggingface_hub import constants

    try:
        about = os.stat(shard)
    except OSError as error:
        raise L2R2Error(f"{shard}: cannot be read ({error.strerror or error}).") from None
    state = (about.st_size, about.st_mtime_ns)
    name = hashlib.sha256(os.path.abspath(shard).encode(errors="surrogateescape")).hexdigest()[:24]
    file = Path(constants.HF_HOME) / "l2r2" / "shards" / f"{name}.npz"
    if (found := _stored(file, state, names)) is not None:
        return found
    if (found := _unsaved.get(shard)) is not None and found["about"].tolist() == [FORMAT, *state]:
        return found
    arrays = _built(shard, state)
    try:
        write_atomic(file, lambda temporary: _save(temporary, arrays))
    except L2R2Error as error:
        if not _unsaved:
            logger.warning("%s Each command indexes the shards again; set HF_HOME to a folder that can be written.", error)
        _unsaved[shard] = arrays
    return arrays


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(file, "wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _stored(file: Path, state: State, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Read arrays of an index from the cache, all of one version; None if there is none of this state."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            if stored["about"].tolist() != [FORMAT, *state]:
                return None
            return {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _built(shard: str, state: State) -> dict[str, np.ndarray]:
    """Index a shard, see `Index`; with the `order` of its members, and the `texts` of their sidecars."""
    try:
        found, texts = _of_tar(shard) if is_tar(shard) else _of_parquet(shard)
    except OSError as error:
        raise L2R2Error(f"{shard}: cannot be read ({error.strerror or error}).") from None
    names = [os.fsencode(name) for name, *_ in found]
    if long := next((name for name in names if len(name) > LONGEST), None):
        raise L2R2Error(
            f"{shard}: the name of a member, {os.fsdecode(long[:40])}..., has {len(long):,} bytes, over {LONGEST:,}; "
            "write the shard again with shorter names."
        )
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
            with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    if member.isdir():
                        continue
                    name = inside(member.name)
                    stem, suffix = posixpath.splitext(name)
                    if suffix.lower() in SIDECARS:
                        if (key := stem + suffix.lower()) in sidecars:
                            raise L2R2Error(f"{shard}/{name}: {TWICE}")
                        sidecars[key] = _text(archive, member, f"{shard}/{name}")
                    else:
                        plain = member.isreg() and not member.issparse()
                        found.append((name, member.offset_data if plain else -1, member.size))
                check_end(file.read)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise L2R2Error(f"{shard}: {_after(found)} ({' '.join(str(error).split())[:200]}); {PACK_AGAIN}") from None
    texts = []
    for name, *_ in found:
        stem = posixpath.splitext(name)[0]
        texts.append((sidecars.get(f"{stem}.json"), sidecars.get(f"{stem}.cls")))
    return found, texts


def _after(found: Sequence[tuple[str, int, int]]) -> str:
    return f"is damaged or truncated after {found[-1][0]}" if found else "is not a tar file that can be read by position"


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str:
    if not member.isreg() or member.size > MAX_BYTES:
        raise L2R2Error(f"{name}: is not a regular file, or too large; pack the file itself.")
    content = archive.extractfile(member)
    assert content is not None  # a regular file
    return content.read().decode("utf-8-sig", errors="surrogateescape")


def _of_parquet(shard: str) -> tuple[list[tuple[str, int, int]], list[tuple[str | None, str | None]]]:
    """Return name, row group and row of each image in a Parquet file, and of its masks; it has no sidecars."""
    pa, _ = pyarrow()
    file = opened(shard)
    image, named = columns_of(file.schema_arrow, shard)
    mask = mask_column(file.schema_arrow)
    found: list[tuple[str, int, int]] = []
    try:
        names = iter(names_of_rows(file, image, named))
        for group in range(file.num_row_groups):
            masks = file.read_row_group(group, [mask]).to_pylist() if mask else []
            for row in range(file.metadata.row_group(group).num_rows):
                name = next(names)
                found.append((name, group, row))
                if mask and encoded(masks[row][mask]) is not None:
                    found.append((name + OF_MASK, group, row))
    except (OSError, pa.ArrowException) as error:
        raise L2R2Error(f"{shard}: is damaged or truncated ({' '.join(str(error).split())[:200]}).") from None
    return found, []

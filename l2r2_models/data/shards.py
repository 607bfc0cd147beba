"""Rows of data sets whose images lie in WebDataset or Parquet shards, with labels, boxes and other metadata beside them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .. import distributed as processes
from ..boxes.parquet import KEY
from ..errors import L2R2Error
from ..images import is_image_path
from ..io import pyarrow
from ..shards import MASK, OF_MASK, SUFFIXES, columns_of, indexed_now, largest_row_group, mask_column, members_of
from .hf_datasets import columns_for, values_of
from .layout import SPLIT_NAMES, described_splits, metadata_in

T = TypeVar("T")
logger = logging.getLogger(__name__)
SLOW = 16_000_000  # bytes of a row group, which take longer to read than a photo to decode
NUMBER = re.compile(r"[-_.]?\d+(-of-\d+\S*)?$")  # in train-00000 and train-00000-of-00010
PLAIN = (str, int, float, list, dict)


def packed_in(data: Path) -> list[Path]:
    """Return the shards of a data set, in order: the file itself, or those in a folder without metadata and image files.

    Parquet files that our commands wrote (boxes, predictions) are left out.
    """
    if data.suffix.lower() in SUFFIXES and data.is_file():
        return [data]
    if not data.is_dir() or metadata_in(data) is not None or described_splits(data):
        return []
    found: list[Path] = []
    for parent, folders, names in os.walk(data):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and not _is_ours(path)]
        if image := next((path for path in paths if is_image_path(path)), None):
            if found:
                logger.warning("%s: its shards are not read, because %s lies beside them; move that elsewhere", data, image.name)
            return []
    return sorted(found)


def _is_ours(path: Path) -> bool:
    if path.suffix.lower() != ".parquet":
        return False
    pa, parquet = pyarrow()
    try:
        return KEY in (parquet.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False  # refused when it is read


def index_shards(data: str | Path) -> None:
    """Index the new and changed shards of a data set, with a progress bar, and warn if they are slow to read in random order.

    Nothing is done for a data set without shards.

    Raises:
        L2R2Error: when a shard cannot be read, or an image is in it twice.
    """
    largest = 0
    for shard in _bar(packed_in(Path(data)), "indexing shards"):
        indexed_now(str(shard))
        largest = max(largest, largest_row_group(str(shard)))
    if largest > SLOW:
        logger.warning(
            "%s: each image is read with its row group of up to %d MB, which slows training down; write the Parquet files with a "
            "smaller row_group_size, such as 16",
            data,
            largest // 1_000_000,
        )


def records_of(root: Path, shards: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the metadata of the images in shards, as `boxes.read_rows` does those of a file; new and changed shards are indexed.

    Args:
        root: the folder that names are relative to.
        shards: the shards, `.tar` or `.parquet`.

    Returns:
        For each image `file_name` (`SHARD/MEMBER`), `label` and `split` if there are any, and its other columns.

    Raises:
        L2R2Error: when a shard cannot be read, an image is in it twice, or a sidecar is not JSON.
    """
    found: list[dict[str, Any]] = []
    of_splits = list(zip(shards, _splits(root, shards)))
    for shard, split in _bar(of_splits, "reading shards"):
        name = shard.relative_to(root).as_posix()
        rows = _of_parquet(shard) if shard.suffix.lower() == ".parquet" else _of_tar(shard)
        for member, record in rows:
            of_split = {"split": split} if split and record.get("split") in (None, "") else {}
            mask = {"mask_file": f"{name}/{record['mask_file']}"} if "mask_file" in record else {}
            found.append({**record, **of_split, **mask, "file_name": f"{name}/{member}"})
    if not found:
        raise L2R2Error(f"{root}: no image in its shards.")
    return found


def _bar(items: Sequence[T], text: str) -> Iterable[T]:
    """Show a progress bar after two seconds, on the first process if stderr is a terminal."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=text, unit="", delay=2, disable=True if processes.rank() else None)
    return bar


def _splits(root: Path, shards: Sequence[Path]) -> list[str | None]:
    """Return the split of each shard by its name (`train-00000.tar`) or folder; None if neither is usual for a split."""
    stems = [NUMBER.sub("", shard.stem) for shard in shards]
    if any(stem.lower() in SPLIT_NAMES for stem in stems):
        return [stem or None for stem in stems]
    folders = [[part for part in shard.relative_to(root).parts[:-1] if part.lower() in SPLIT_NAMES] for shard in shards]
    return [parts[0] for parts in folders] if all(folders) else [None] * len(shards)


def _of_tar(shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    members = list(members_of(str(shard)))
    masks = {m.name[: -len(MASK)]: m.name for m in members if m.name.lower().endswith(MASK)}
    of_masks = set(masks.values())
    for member in members:
        if member.name in of_masks or not is_image_path(Path(member.name)):
            continue
        stem = str(PurePosixPath(member.name).with_suffix(""))
        record = _parsed(member.json, f"{shard}/{stem}.json") if member.json is not None else {}
        if record.get("label") is None and member.label is not None:
            record["label"] = member.label.strip()
        if isinstance(record.get("label"), (list, dict)):
            raise L2R2Error(
                f"{shard}/{stem}.json: the label is not a single value; write one per image, or one per box in `objects`."
            )
        yield member.name, {**record, **({"mask_file": masks[stem]} if stem in masks else {})}


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise L2R2Error(f"{name}: is not readable JSON ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(record, dict):
        raise L2R2Error(f'{name}: is not a JSON object; write e.g. {{"label": "oak"}}.')
    return record


def _of_parquet(shard: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    names = [member.name for member in members_of(str(shard))]  # first, because it refuses a damaged file
    try:
        from datasets import Features, Value
    except ImportError as error:
        raise L2R2Error('Labels in Parquet shards need more packages: pip install "l2r2-models[train]".') from error
    pa, parquet = pyarrow()
    with parquet.ParquetFile(shard) as file:
        image, _ = columns_of(file.schema_arrow, str(shard))
        mask = mask_column(file.schema_arrow)
        plain = [f for f in file.schema_arrow if not pa.types.is_map(f.type)]  # `datasets` has no such type
        try:
            features = Features.from_arrow_schema(pa.schema(plain, file.schema_arrow.metadata))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise L2R2Error(f"{shard}: `datasets` cannot read its columns ({why}); write the shard again.") from None
        kept = {n: kind for n, kind in features.items() if not (isinstance(kind, Value) and "binary" in kind.dtype)}
        roles = columns_for(kept, image, mask, "label" if "label" in kept else None, str(shard))
        more = [name for name in ("split", "boxes") if name in kept]
        used = [name for name in (roles.label, roles.objects, *roles.others, *more) if name]
        try:
            rows = file.read(used).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise L2R2Error(f"{shard}: is damaged or truncated ({' '.join(str(error).split())[:200]}).") from None
    images: dict[str, bool] = {}  # whether each has a mask, which is the next member
    last = ""
    for name in names:
        if mask and name == last + OF_MASK:
            images[last] = True
        else:
            images[name], last = False, name
    for (name, has_mask), row in zip(images.items(), rows or [{}] * len(images)):
        try:
            values = values_of(row, roles, kept)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise L2R2Error(f"{shard}/{name}: its columns cannot be read ({' '.join(str(error).split())[:200]}).") from None
        record = values | {key: row[key] for key in more if row[key] is not None}
        record = {key: value if isinstance(value, PLAIN) else str(value) for key, value in record.items()}
        yield name, {**record, **({"mask_file": name + OF_MASK} if has_mask else {})}

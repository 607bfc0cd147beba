"""Data sets of the Hugging Face Hub, or saved on disk by `datasets`, as folders of images.

`hf:org/name` is loaded by `datasets` (`hf:path` for a local folder of Parquet or similar); a folder written by `save_to_disk` is
detected. The images are written once, byte for byte, next to the cache of `datasets`, with a metadata.jsonl; later calls reuse
them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import parse_qsl

from ..errors import L2R2Error
from ..images import FORMATS, IMAGE_SUFFIXES
from ..io import check_readable, write_bytes, write_text
from ..offline import cache_if_offline
from ..shards import MASKS

PREFIX = "hf:"
SAVED = ("dataset_dict.json", "state.json")  # files that identify a folder of save_to_disk
OPTIONS = ("config", "revision", "image", "label", "mask")
LABELS = ("label", "labels", "class", "category", "target", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The roles of a data set's columns.

    Attributes:
        image: the image.
        label: the label, or None.
        mask: the mask image, or None.
        objects: the boxes, or None.
        others: columns with plain values, which become metadata.
    """

    image: str
    label: str | None
    mask: str | None
    objects: str | None
    others: tuple[str, ...]


def is_source(data: str | Path) -> bool:
    """Return whether `data` must be converted to a folder first.

    >>> is_source("hf:org/name")
    True
    """
    return str(data).startswith(PREFIX) or any((Path(data) / name).is_file() for name in SAVED)


def as_folder(data: str | Path) -> Path:
    """Write a data set as an `imagefolder` with metadata.jsonl, unless it was written before; an interrupted call is resumed.

    Args:
        data: `hf:org/name`, `hf:folder`, or a folder of `save_to_disk`. Options follow after a `?`: `config` and `revision`, and
            the columns `image`, `label` and `mask` if they are ambiguous, e.g. `hf:org/name?config=full&label=species`.

    Returns:
        A folder that `read_table` reads, with splits, label names, `objects` with `bbox` (x, y, width, height in pixels, as in
        the Hub's `imagefolder`), `score` and `label`, a mask column, and other plain columns.

    Raises:
        L2R2Error: when the data set cannot be loaded, its image column is missing or ambiguous, or an option is unknown.
    """
    try:
        import datasets
    except ImportError as error:
        raise L2R2Error('Data sets from the Hub need more packages: pip install "l2r2-models[train]".') from error
    name, _, query = str(data).removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise L2R2Error(f'{data}: unknown option "{unknown[0]}"; choose from {", ".join(OPTIONS)}.')
    splits = _load(name, options)
    key = json.dumps(
        [[split, ds._fingerprint, len(ds), repr(ds.features)] for split, ds in splits.items()] + [sorted(options.items())]
    )
    stem = re.sub(r"[^\w.-]+", "-", PurePath(name).name)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "l2r2" / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "metadata.jsonl").is_file():
        _export(splits, options, folder, str(data))
    return folder


def _load(name: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Load the splits by name; a data set without splits has a single one named ""."""
    import datasets

    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            loaded = datasets.load_from_disk(name)
        else:
            with cache_if_offline():
                loaded = datasets.load_dataset(name, options.get("config"), revision=options.get("revision"))
    except Exception as error:  # datasets, the Hub and the file system each raise their own
        what = " ".join(str(error).split())[:200] or type(error).__name__
        hint = "" if Path(name).exists() else "; an id is org/name, and the first call needs network access"
        raise L2R2Error(f"{PREFIX}{name}: cannot be loaded ({what.rstrip('.')}){hint}.") from error
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def _columns(features: Any, options: Mapping[str, str], data: str) -> Columns:
    from datasets import Image

    def chosen(what: str) -> str | None:
        if (name := options.get(what)) is not None and name not in features:
            raise L2R2Error(f'{data}: has no column "{name}"; choose from {", ".join(features)}.')
        return name

    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    mask = chosen("mask") or next((name for name in images if name in MASKS), None)
    rest = [name for name in images if name != mask]
    image = chosen("image") or ("image" if "image" in rest else rest[0] if len(rest) == 1 else None)
    if image is None:
        found = f"several image columns, {', '.join(rest)}" if rest else "no image column"
        raise L2R2Error(f"{data}: has {found}; name the one to use as {PREFIX}ID?image=COLUMN.")
    return columns_for(features, image, mask, chosen("label"), data)


def columns_for(features: Any, image: str, mask: str | None, label: str | None, data: str) -> Columns:
    """Return the roles of a data set's columns.

    Args:
        features: `datasets.Features`.
        image, mask: the columns of images and masks.
        label: the column of labels; by default the first one with a usual name, or else the only `ClassLabel`.
        data: name of the data set, for messages.

    Raises:
        L2R2Error: when the column `label` has no single value per image.
    """
    from datasets import ClassLabel, Value

    named = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    plain = [n for n, kind in features.items() if isinstance(kind, (ClassLabel, Value)) and n not in (image, mask)]
    label = label or next((n for n in LABELS if n in plain), named[0] if len(named) == 1 else None)
    if label is not None and label not in plain:
        raise L2R2Error(f'{data}: the column "{label}" does not have one label per image; choose another column.')
    others = tuple(n for n in plain if n not in (label, "file_name", "split", "label", "mask_file", "boxes", "objects"))
    boxed = "objects" in features and "bbox" in _kinds(features["objects"])
    return Columns(image, label, mask, "objects" if boxed else None, others)


def _export(splits: Mapping[str, Any], options: Mapping[str, str], folder: Path, data: str) -> None:
    from datasets import Image
    from datasets.utils import tqdm

    lines = []
    for split, rows in splits.items():
        columns = _columns(rows.features, options, data)
        used = [c for c in (columns.image, columns.label, columns.mask, columns.objects, *columns.others) if c]
        rows = rows.select_columns(used)
        for column in filter(None, (columns.image, columns.mask)):
            rows = rows.cast_column(column, Image(decode=False))
        names = _Names()
        for i, row in enumerate(tqdm(rows, desc=f"writing the images of {split or data}", unit="")):
            file = _write(row[columns.image], folder, names.of(row[columns.image], f"{split or 'images'}", i))
            record = {"file_name": file, **({"split": split} if split else {}), **values_of(row, columns, rows.features)}
            if columns.mask and row[columns.mask] is not None:
                record["mask_file"] = _write(row[columns.mask], folder, f"masks/{PurePath(file).with_suffix('')}.png")
            lines.append(json.dumps(record, ensure_ascii=False))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")  # written last, so it marks the folder as complete


class _Names:
    """Unique names of the written images: the original ones where possible, so that box files match."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, stored: Mapping[str, Any] | None, folder: str, number: int) -> str:
        original = PurePath(str((stored or {}).get("path") or "")).name
        stem, suffix = re.sub(r"[^\w.-]", "_", PurePath(original).stem)[:100], PurePath(original).suffix.lower()
        suffix = suffix if suffix in IMAGE_SUFFIXES else _suffix_of(_bytes(stored))
        name = f"{folder}/{stem}{suffix}"
        if not stem or stem.startswith(".") or name.lower() in self.taken:
            name = f"{folder}/{number:07d}{'_' if stem else ''}{stem}{suffix}"
        self.taken.add(name.lower())
        return name


def _bytes(stored: Mapping[str, Any] | None) -> bytes:
    """An image's encoded bytes; empty for a row without an image, which `check_images` then reports by name."""
    if stored is None:
        return b""
    content: bytes | None = stored.get("bytes")
    if content is not None:
        return content
    check_readable(stored["path"])
    return Path(stored["path"]).read_bytes()


def _suffix_of(content: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
            return f".{str(image.format).lower()}".replace(".jpeg2000", ".jp2").replace(".mpo", ".jpg").replace(".dib", ".bmp")
    except Exception:  # `check_images` reports a damaged or unknown file
        return ".img"


def _write(stored: Mapping[str, Any] | None, folder: Path, name: str) -> str:
    content = _bytes(stored)
    file = folder / name
    if not (file.is_file() and file.stat().st_size == len(content)):
        write_bytes(file, content)
    return name


def values_of(row: Mapping[str, Any], columns: Columns, features: Any) -> dict[str, Any]:
    """Return the label, the boxes and the other plain columns of a row, as in a line of metadata.jsonl."""
    values = {name: _named(features[name], row[name]) for name in columns.others}
    if columns.label and (label := _named(features[columns.label], row[columns.label])) is not None:
        values["label"] = str(label)
    if columns.objects:
        values["objects"] = _objects(row[columns.objects], features[columns.objects])
    return {name: value for name, value in values.items() if value is not None}


def _objects(objects: Any, kind: Any) -> dict[str, Any]:
    """`{bbox, score, label}` of a row's objects, given as a list of records or a record of lists."""
    kinds = _kinds(kind)
    if isinstance(objects, list):
        objects = {name: [each.get(name) for each in objects] for name in kinds}
    found: dict[str, Any] = {"bbox": (objects or {}).get("bbox") or []}
    for target, names in (("score", ("score", "scores")), ("label", ("label", "labels", "category", "categories"))):
        name = next((n for n in names if n in kinds and objects), None)
        if name and found["bbox"]:
            inner = _inner(kinds[name])
            found[target] = [_named(inner, value) for value in objects[name]]
    if "label" in found:
        found["label"] = ["" if label is None else str(label) for label in found["label"]]
    return found


def _kinds(kind: Any) -> dict[str, Any]:
    """The features of a list of records, or of a record of lists; empty for anything else."""
    kind = _inner(kind)
    return dict(kind) if isinstance(kind, Mapping) else {}


def _inner(kind: Any) -> Any:
    """The feature inside a list, or the feature itself."""
    kind = getattr(kind, "feature", kind)
    return kind[0] if isinstance(kind, list) else kind


def _named(kind: Any, value: Any) -> Any:
    """Convert a class index to its name; -1, which hides the labels of the Hub's test splits, becomes None."""
    if hasattr(kind, "int2str") and isinstance(value, int):
        return kind.int2str(value) if value >= 0 else None
    return value

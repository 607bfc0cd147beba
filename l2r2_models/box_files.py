"""Box files: the formats in the wild, read into one table and written from it. Boxes are joined to images by path."""

from __future__ import annotations

import csv
import json
import logging
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .boxes import Detections
from .errors import L2R2Error
from .files import read_json, write_json

RELATIVE = "all coordinates lie in [0, 1], but this format is in pixels; write pixels or use MegaDetector's format."
logger = logging.getLogger(__name__)
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BoxEntry:
    """What a box file says of one image.

    Attributes:
        boxes: xyxy, in pixels, or in [0, 1] where `normalised`.
        scores: one a box; 1 where the file has none.
        labels: one a box; "" where the file has none.
        normalised: boxes are relative to the image size.
        image_size: `(height, width)` where the file gives it.
        failure: why the localizer failed on this image, or None.
    """

    boxes: tuple[Box, ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    normalised: bool = False
    image_size: tuple[int, int] | None = None
    failure: str | None = None

    def detections(self, image_size: tuple[int, int], name: str) -> Detections:
        """As pixels of an image of `(height, width)`, unclipped, best first.

        Raises:
            L2R2Error: the file was made for an image of another size.
        """
        if self.image_size is not None and tuple(self.image_size) != tuple(image_size):
            (h, w), (height, width) = self.image_size, image_size
            hint = "; were the boxes made without EXIF orientation?" if (h, w) == (width, height) else "."
            raise L2R2Error(f"{name}: the box file was made for a {w}x{h} image, this one is {width}x{height}{hint}")
        height, width = image_size if self.normalised else (1, 1)
        pixels = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in self.boxes]
        return Detections.from_lists(pixels, image_size, self.scores, self.labels)


@dataclass
class BoxTable:
    """Box entries by the path that the file gives them; `source` and `format` for messages."""

    entries: dict[str, BoxEntry]
    source: str = ""
    format: str = ""
    _by_name: dict[str, list[tuple[tuple[str, ...], str]]] = field(default_factory=dict, repr=False)  # parts of a path, the path

    def __post_init__(self) -> None:
        for key in self.entries:
            self._by_name.setdefault((parts := _parts(key))[-1], []).append((parts, key))

    def find(self, path: str | Path) -> BoxEntry | None:
        """The entry of an image: the same path, or the only one of which one path is the end of the other.

        Raises:
            L2R2Error: several entries fit.
        """
        key = self._key(str(path))
        return None if key is None else self.entries[key]

    def _key(self, path: str) -> str | None:
        if path in self.entries:
            return path
        wanted = _parts(path)
        named = self._by_name.get(wanted[-1], ())
        same = [key for parts, key in named if parts == wanted]
        fits = same if len(same) == 1 else [key for parts, key in named if _ends_alike(parts, wanted)]
        if len(fits) > 1:
            raise L2R2Error(f"{self.source}: {len(fits)} entries fit {path} ({fits[0]}, {fits[1]}, ...); use longer paths in it.")
        return fits[0] if fits else None

    def join(self, paths: Iterable[str | Path]) -> dict[str, BoxEntry]:
        """Entries by image path, for the images that have one.

        Raises:
            L2R2Error: no image has an entry, or two images would share one (a file of bare names for several folders).
        """
        joined: dict[str, BoxEntry] = {}
        used: dict[str, str] = {}
        for path in map(str, paths):
            if (key := self._key(path)) is None:
                continue
            if (other := used.setdefault(key, path)) != path:
                raise L2R2Error(f"{self.source}: one entry fits both {other} and {path}; use longer paths in it.")
            joined[path] = self.entries[key]
        if not joined:
            raise L2R2Error(f"{self.source}: none of its {len(self.entries)} entries belongs to one of the images.")
        return joined


def read_boxes(path: str | Path) -> BoxTable:
    """Read a box file; its format is recognised by its content and logged.

    Known: metadata CSV and JSONL, COCO (`annotations`), MegaDetector (`detection_categories` or `info`), SpeciesNet
    (`predictions`), and plain JSON: `{"a.jpg": [[x0, y0, x1, y1], ...]}` in pixels.

    Raises:
        L2R2Error: unreadable, unknown or ambiguous; the message names the file and the entry.
    """
    path = Path(path)
    if not path.exists():
        raise L2R2Error(f"{path}: no such box file.")
    if path.suffix.lower() in (".csv", ".jsonl"):
        rows = read_rows(path)
        kind, entries = "metadata", entries_of_rows(rows, str(path))
    else:
        data = read_json(path)
        kind = _sniff(data, str(path))
        try:
            entries = _table(_READERS[kind](data))
        except L2R2Error as error:
            raise L2R2Error(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise L2R2Error(f"{path}: looks like {kind}, but is not well formed ({type(error).__name__}: {error}).") from error
    logger.info("%s: %s format, %d images", path, kind, len(entries))
    return BoxTable(entries, str(path), kind)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metadata .csv or .jsonl as dicts.

    Raises:
        L2R2Error: unreadable, empty, or without the column file_name; the message names file and line.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = [_json_line(line, path, i) for i, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise L2R2Error(f"{path}: cannot be read as {path.suffix[1:]} ({error}).") from error
    if not rows:
        raise L2R2Error(f"{path}: has no rows.")
    for i, row in enumerate(rows, 2 if path.suffix.lower() == ".csv" else 1):  # a CSV's first line is its header
        if not isinstance(row, dict) or not row.get("file_name"):
            raise L2R2Error(f"{path}: row {i} has no file_name; each row needs one.")
    return rows


def entries_of_rows(rows: Iterable[Mapping[str, Any]], source: str) -> dict[str, BoxEntry]:
    """Boxes in metadata rows: columns x0, y0, x1, y1 (and score) in pixels, several rows an image for several boxes;
    `boxes` = list of xyxy; or `objects: {bbox: [[x, y, w, h]], score: [...]}` as Hugging Face's imagefolder has it."""
    entries: dict[str, BoxEntry] = {}
    for row in rows:
        name = str(row["file_name"])
        old = entries.get(name, BoxEntry())
        try:
            boxes, scores = _row_boxes(row)
            entries[name] = _entry([*old.boxes, *boxes], [*old.scores, *scores], [*old.labels, *("" for _ in boxes)], name)
        except L2R2Error as error:
            raise L2R2Error(f"{source}: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            raise L2R2Error(f"{source}: the box of {name} is not four numbers.") from None
    if _all_relative(entries):
        raise L2R2Error(f"{source}: {RELATIVE}")
    return entries


def write_boxes(table: BoxTable, path: str | Path, format: str = "megadetector") -> None:
    """Write a table as `megadetector` (1.6), `coco` or `xyxy` JSON, atomically.

    Raises:
        L2R2Error: unknown format, or an entry without the image size that the format needs.
    """
    writers: dict[str, Callable[[BoxTable], Any]] = {"megadetector": _to_megadetector, "coco": _to_coco, "xyxy": _to_xyxy}
    if format not in writers:
        raise L2R2Error(f'Unknown box format "{format}"; choose from {", ".join(writers)}.')
    write_json(path, writers[format](table))


def _sniff(data: Any, source: str) -> str:
    if isinstance(data, dict):
        if "annotations" in data and "images" in data:
            return "COCO"
        if "predictions" in data:
            return "SpeciesNet"
        if "images" in data and ("detection_categories" in data or "info" in data):
            return "MegaDetector"
        if data and all(isinstance(v, list) for v in data.values()):
            return "plain xyxy"
    raise L2R2Error(
        f"{source}: no box format that is known here; use MegaDetector, SpeciesNet or COCO JSON, metadata CSV or JSONL, "
        'or {"image.jpg": [[x0, y0, x1, y1]]}.'
    )


def _table(found: Iterable[tuple[str, BoxEntry]]) -> dict[str, BoxEntry]:
    entries: dict[str, BoxEntry] = {}
    for file, entry in found:
        if not isinstance(file, str) or not file:
            raise L2R2Error(f"the image name {file!r} is not a path.")
        if file in entries:
            raise L2R2Error(f"there are two entries for {file}; merge them.")
        entries[file] = entry
    if _all_relative(entries):
        raise L2R2Error(RELATIVE)
    return entries


def _all_relative(entries: Mapping[str, BoxEntry]) -> bool:
    """Whether boxes that should be in pixels all lie in [0, 1]."""
    boxes = [box for entry in entries.values() if not entry.normalised for box in entry.boxes]
    return bool(boxes) and all(0 <= v <= 1 for box in boxes for v in box)


def _read_megadetector(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    names = data.get("detection_categories", {})
    for image in data["images"]:
        yield image["file"], _relative_entry(image, names, image.get("failure"), image["file"])


def _read_speciesnet(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    for image in data["predictions"]:
        failures = None if image.get("detections") else image.get("failures")  # the classifier may fail where boxes are found
        failure = ", ".join(failures) if isinstance(failures, list) else failures
        yield image["filepath"], _relative_entry(image, {}, failure, image["filepath"])


def _relative_entry(image: dict[str, Any], names: dict[str, str], failure: str | None, file: str) -> BoxEntry:
    found = image.get("detections") or []
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (d["bbox"] for d in found)]
    labels = [d.get("label") or names.get(str(d.get("category", "")), "") for d in found]
    if any(abs(v) > 10 for box in boxes for v in box):  # a little outside is usual, this is not
        raise L2R2Error(f"the boxes of {file} are in pixels, where this format has fractions of the image's width and height.")
    return _entry(boxes, [d.get("conf", 1.0) for d in found], labels, file, True, _image_size(image, file), failure)


def _read_coco(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    names = {c["id"]: c["name"] for c in data.get("categories", [])}
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in data["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    if by_image and not any(image["id"] in by_image for image in data["images"]):
        raise L2R2Error("no annotation's image_id is the id of one of its images.")
    for image in data["images"]:
        found = by_image.get(image["id"], [])
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in found)]
        labels = [names.get(a.get("category_id"), "") for a in found]
        file, scores = image["file_name"], [a.get("score", 1.0) for a in found]
        yield file, _entry(boxes, scores, labels, file, False, _image_size(image, file), image.get("failure"))


def _read_xyxy(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    for file, boxes in data.items():
        yield file, _entry(boxes, [1.0] * len(boxes), [""] * len(boxes), file)


_READERS: dict[str, Callable[[Any], Iterable[tuple[str, BoxEntry]]]] = {
    "MegaDetector": _read_megadetector, "SpeciesNet": _read_speciesnet, "COCO": _read_coco, "plain xyxy": _read_xyxy,
}  # fmt: skip


def _row_boxes(row: Mapping[str, Any]) -> tuple[list[Any], list[float]]:
    if (objects := row.get("objects")) is not None:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in objects["bbox"]]
        scores = objects.get("score")
        return boxes, [1.0] * len(boxes) if scores is None else list(scores)
    if (listed := row.get("boxes")) is not None:
        return list(listed), [1.0] * len(listed)
    ends = [row.get(k) for k in ("x0", "y0", "x1", "y1")]
    if all(end in (None, "") for end in ends):
        return [], []
    score = row.get("score")
    return [tuple(float(end) for end in ends)], [1.0 if score in (None, "") else float(score)]  # type: ignore[arg-type]


def _entry(
    boxes: Iterable[Any],
    scores: Iterable[float],
    labels: Iterable[str],
    file: str,
    normalised: bool = False,
    image_size: tuple[int, int] | None = None,
    failure: str | None = None,
) -> BoxEntry:
    boxes, scores, labels = [tuple(box) for box in boxes], list(scores), list(labels)
    for box in boxes:
        if len(box) != 4 or not all(map(_is_number, box)):
            raise L2R2Error(f"the box {list(box)} of {file} is not four finite numbers.")
    if not len(boxes) == len(scores) == len(labels):
        raise L2R2Error(f"{file} has {len(boxes)} boxes and {len(scores)} scores.")
    for score in scores:
        if not _is_number(score) or not 0 <= score <= 1.001:  # rounding may carry a little beyond 1
            raise L2R2Error(f"the score {score!r} of {file} does not lie between 0 and 1.")
    if not all(isinstance(text, str) for text in (*labels, failure or "")):
        raise L2R2Error(f"a label or the failure of {file} is not text.")
    pixels = tuple(tuple(map(float, box)) for box in boxes)
    return BoxEntry(pixels, tuple(map(float, scores)), tuple(labels), normalised, image_size, failure)  # type: ignore[arg-type]


def _image_size(image: Mapping[str, Any], file: str) -> tuple[int, int] | None:
    """`(height, width)` where both are given."""
    height, width = image.get("height"), image.get("width")
    if height is None or width is None:
        return None
    if not all(_is_number(side) and side >= 1 and side == int(side) for side in (height, width)):
        raise L2R2Error(f"the size of {file}, {width!r}x{height!r}, is not in whole pixels.")
    return int(height), int(width)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise L2R2Error(f"{path}: line {number} is not JSON ({error}).") from None


def _to_megadetector(table: BoxTable) -> dict[str, Any]:
    names = sorted({label or "object" for e in table.entries.values() for label in e.labels} | {"object"})
    ids = {name: str(i) for i, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    for file, entry in table.entries.items():
        if entry.failure is not None:
            images.append({"file": file, "failure": entry.failure})
            continue
        height, width = (1, 1) if entry.normalised else _size(entry, file, "megadetector")
        found = [
            {
                "category": ids[label or "object"],
                "conf": round(score, 4),
                "bbox": [round(v, 9) for v in (x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height)],
            }
            for (x0, y0, x1, y1), score, label in zip(entry.boxes, entry.scores, entry.labels)
        ]
        sizes = {} if entry.image_size is None else {"width": entry.image_size[1], "height": entry.image_size[0]}
        images.append({"file": file, **sizes, "detections": found})
    categories = {i: name for name, i in ids.items()}
    return {"info": {"format_version": "1.6", "detector": "l2r2-models"}, "detection_categories": categories, "images": images}


def _to_coco(table: BoxTable) -> dict[str, Any]:
    names = sorted({label or "object" for e in table.entries.values() for label in e.labels})
    ids = {name: i for i, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file, entry) in enumerate(table.entries.items(), 1):
        image: dict[str, Any] = {"id": number, "file_name": file}
        if entry.failure is not None:  # an image that could not be read has no size
            images.append({**image, "failure": entry.failure})
            continue
        height, width = _size(entry, file, "coco")
        images.append({**image, "width": width, "height": height})
        for (x0, y0, x1, y1), score, label in zip(_pixels(entry, file), entry.scores, entry.labels):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": ids[label or "object"],
                                "bbox": box, "area": box[2] * box[3], "iscrowd": 0, "score": score})  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for n, i in ids.items()]}


def _to_xyxy(table: BoxTable) -> dict[str, Any]:
    found = {file: entry for file, entry in table.entries.items() if entry.failure is None}  # the format has no failures
    return {file: [list(box) for box in _pixels(entry, file)] for file, entry in found.items()}


def _pixels(entry: BoxEntry, file: str) -> list[Box]:
    height, width = _size(entry, file, "pixel") if entry.normalised and entry.boxes else (1, 1)
    return [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in entry.boxes]


def _size(entry: BoxEntry, file: str, format: str) -> tuple[int, int]:
    if entry.image_size is None:
        raise L2R2Error(f"{file}: its image size is not known, which the {format} format needs.")
    return entry.image_size


def _parts(path: str) -> tuple[str, ...]:
    # macOS writes accents as characters of their own (NFD), other systems do not
    return PurePosixPath(unicodedata.normalize("NFC", path.replace("\\", "/"))).parts or ("",)


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    shorter = min(len(a), len(b))
    return a[-shorter:] == b[-shorter:]

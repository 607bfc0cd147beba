"""Read the common box file formats into one table."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import L2R2Error
from ..io import check_readable, read_json
from .annotations import is_openimages, read_coco_results, read_cvat, read_folder, read_label_studio, read_openimages
from .entries import checked_entry, size_of
from .megadetector import read_categories, read_frames, read_megadetector, read_speciesnet
from .parquet import MANIFEST, read_parquet
from .table import BoxEntry, BoxTable, Frame

RELATIVE = "all coordinates lie in [0, 1], but this format uses pixels; write pixels or use MegaDetector's format."
CORNERS = tuple(names.split() for names in ("x0 y0 x1 y1", "xmin ymin xmax ymax", "x1 y1 x2 y2", "left top right bottom"))
SIDES = tuple(f"{start} {sides}".split() for start in ("x y", "left top", "xmin ymin") for sides in ("w h", "width height"))
COLUMNS = "name its columns x0,y0,x1,y1 or xmin,ymin,xmax,ymax or left,top,right,bottom or x,y,width,height, in pixels"
_KNOWN = {name for columns in (*CORNERS, *SIDES) for name in columns}
_OF_A_BOX = _KNOWN - {"x", "y", "w", "h", "width", "height", "left", "top", "right", "bottom"}  # too generic alone
# unsupported forms: a box in one column, a center and size, or rare names
_LIKE_A_BOX = {
    name
    for names in (
        "bbox box bboxes boxes boundingbox cx cy xc yc xcenter ycenter centerx centery",
        "xtl ytl xbr ybr xleft ytop xright ybottom minx miny maxx maxy",
    )
    for name in names.split()
}
_FILES = {"filename", "file", "image", "imagename", "imagepath", "filepath", "path", "img"}
SCORES = ("score", "confidence", "conf")
logger = logging.getLogger(__name__)


def read_boxes(path: str | Path) -> BoxTable:
    """Read a box file; its format is detected from its content and logged.

    Supported formats: metadata CSV and JSONL, COCO (`annotations`, or a list of results), MegaDetector (`detection_categories` or
    `info`), SpeciesNet (`predictions`), plain JSON `{"a.jpg": [[x0, y0, x1, y1], ...]}` in pixels, the Parquet of `write_boxes`,
    folders of it from `l2r2 localize --engine ray`, Label Studio's JSON, CVAT's XML, OpenImages' CSV, and folders of YOLO, Pascal
    VOC or LabelMe files. Masks are read if they are COCO RLE; COCO's polygons are ignored.

    Raises:
        L2R2Error: when the file is unreadable, of an unknown format, or ambiguous; the message names the file and the entry.
    """
    path = Path(path)
    info: dict[str, Any] = {}
    stamps: dict[str, str] = {}
    detector = None
    categories: dict[str, str] = {}
    frames: dict[str, Frame] = {}
    if not path.exists():
        raise L2R2Error(f"{path}: no such box file.")
    if path.suffix.lower() == ".parquet" or (path / MANIFEST).is_file():
        records, info = read_parquet(path)
        kind, entries, stamps = "Parquet", _checked("Parquet", _read_parquet, records, path), _stamps(records)
    elif path.is_dir():
        kind, entries = read_folder(path)
    elif path.suffix.lower() == ".xml":
        kind, entries = "CVAT", read_cvat(path)
    elif path.suffix.lower() == ".csv" and is_openimages(path):
        kind, entries = "OpenImages", _checked("OpenImages", read_openimages, path, path)
    elif path.suffix.lower() in (".csv", ".jsonl"):
        rows = read_rows(path)
        if box_columns(rows, str(path)) is None and not any("objects" in row or "boxes" in row for row in rows):
            raise L2R2Error(f"{path}: has no box columns; {COLUMNS}.")
        kind, entries = "metadata", entries_of_rows(rows, str(path))
    else:
        data = read_json(path)
        kind = _sniff(data, str(path))
        entries = _checked(kind, _READERS[kind], data, path)
        info, data = (_info(data), data) if isinstance(data, dict) else ({}, {})
        stamps = _stamps(data.get("images", ())) if info else {}
        if kind == "MegaDetector":
            with _reading(kind, path):
                categories, frames = read_categories(data), read_frames(data)
        detector = data["info"].get("detector") if isinstance(data.get("info"), dict) else None
    logger.info("%s: %s format, %d images", path, kind, len(entries))
    if info.get("oracle"):
        logger.warning("%s: the boxes were found with each image's true label as prompt (oracle); for analysis only", path)
    return BoxTable(entries, str(path), kind, info, stamps, str(info.get("localizer") or detector or ""), categories, frames)


def _checked(kind: str, read: Callable[[Any], Iterable[tuple[str, BoxEntry]]], data: Any, path: Path) -> dict[str, BoxEntry]:
    with _reading(kind, path):
        return _table(read(data))


@contextmanager
def _reading(kind: str, path: Path) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except L2R2Error as error:
        raise L2R2Error(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise L2R2Error(f"{path}: looks like {kind}, but is malformed ({type(error).__name__}: {error}).") from error


def _info(data: dict[str, Any]) -> dict[str, Any]:
    """The metadata that `l2r2 localize` writes about itself; empty for other files."""
    info = data.get("info")
    ours = info.get("l2r2") if isinstance(info, dict) else None
    return ours if isinstance(ours, dict) else {}


def _stamps(images: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {i.get("file") or i["file_name"]: i["stamp"] for i in images if isinstance(i.get("stamp"), str)}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metadata .csv or .jsonl file as dicts.

    Raises:
        L2R2Error: when the file is unreadable or empty, or a row has no `file_name`; the message names the file and the line.
    """
    path = Path(path)
    check_readable(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".csv":
                rows: list[dict[str, Any]] = _csv_rows(file, path)
            else:
                rows = [_json_line(line, path, i) for i, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise L2R2Error(f"{path}: cannot be read as {path.suffix[1:]} ({error}).") from error
    if not rows:
        raise L2R2Error(f"{path}: has no rows; it needs one row per image.")
    for i, row in enumerate(rows, 2 if path.suffix.lower() == ".csv" else 1):  # a CSV's first line is its header
        if not isinstance(row, dict) or not row.get("file_name"):
            raise L2R2Error(f"{path}: row {i} has no file_name; each row needs one.")
    return rows


def entries_of_rows(rows: Iterable[Mapping[str, Any]], source: str) -> dict[str, BoxEntry]:
    """Read the boxes in metadata rows, by image path.

    A row gives its boxes in one of three ways: four columns (see `box_columns`) and an optional score, with one row per box;
    `boxes`, a list of xyxy; or `objects: {bbox: [[x, y, w, h]], score: [...], label: [...]}`, as in Hugging Face's imagefolder.

    Args:
        rows: dicts with `file_name`.
        source: the file's name, for messages.

    Raises:
        L2R2Error: when a box is malformed or incomplete, or all boxes lie in [0, 1].

    >>> entries_of_rows([{"file_name": "a.jpg", "x0": 1, "y0": 2, "x1": 3, "y1": 4}], "metadata.csv")["a.jpg"].boxes
    ((1.0, 2.0, 3.0, 4.0),)
    """
    rows = list(rows)
    columns = box_columns(rows, source)
    entries: dict[str, BoxEntry] = {}
    for row in rows:
        name = str(row["file_name"])
        old = entries.get(name, BoxEntry())
        try:
            boxes, scores, labels = _row_boxes(row, columns)
            entries[name] = checked_entry([*old.boxes, *boxes], [*old.scores, *scores], [*old.labels, *labels], name)
        except L2R2Error as error:
            raise L2R2Error(f"{source}: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            raise L2R2Error(f"{source}: the box of {name} is not four numbers.") from None
    if _all_relative(entries):
        raise L2R2Error(f"{source}: {RELATIVE}")
    return entries


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
    if isinstance(data, list) and data and all(isinstance(one, dict) for one in data):
        if "image_id" in data[0] and "bbox" in data[0]:
            return "COCO results"
        if "data" in data[0] and ("annotations" in data[0] or "predictions" in data[0]):
            return "Label Studio"
    raise L2R2Error(
        f"{source}: is not in a supported box format; use MegaDetector, SpeciesNet or COCO JSON, metadata CSV or JSONL, "
        'or {"image.jpg": [[x0, y0, x1, y1]]}.'
    )


def _table(found: Iterable[tuple[str, BoxEntry]]) -> dict[str, BoxEntry]:
    entries: dict[str, BoxEntry] = {}
    for file, entry in found:
        if not isinstance(file, str) or not file:
            raise L2R2Error(f"the image name {file!r} is not a path; give each entry the path of its image.")
        if file in entries:
            raise L2R2Error(f"there are two entries for {file}; merge them.")
        entries[file] = entry
    if _all_relative(entries):
        raise L2R2Error(RELATIVE)
    return entries


def _all_relative(entries: Mapping[str, BoxEntry]) -> bool:
    """Whether boxes that should be in pixels all lie in [0, 1]."""
    boxes = [box for entry in entries.values() if not entry.normalized for box in entry.boxes]
    return bool(boxes) and all(0 <= v <= 1 for box in boxes for v in box)


def _read_coco(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    names = {c["id"]: c["name"] for c in data.get("categories", [])}
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in data["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    if by_image and not any(image["id"] in by_image for image in data["images"]):
        raise L2R2Error("no annotation's image_id matches the id of an image; check that both come from the same file.")
    for image in data["images"]:
        found = by_image.get(image["id"], [])
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in found)]
        labels = [names.get(a.get("category_id"), "") for a in found]
        file, scores = image["file_name"], [a.get("score", 1.0) for a in found]
        masks = [s if isinstance(s := a.get("segmentation"), dict) else None for a in found]
        yield file, checked_entry(boxes, scores, labels, file, False, size_of(image, file), image.get("failure"), masks)


def _read_xyxy(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    for file, boxes in data.items():
        yield file, checked_entry(boxes, [1.0] * len(boxes), [""] * len(boxes), file)


def _read_parquet(records: list[dict[str, Any]]) -> Iterable[tuple[str, BoxEntry]]:
    for row in records:
        yield row["file"], entry_of(row)


def entry_of(record: Mapping[str, Any]) -> BoxEntry:
    """Convert a record of `parquet.record_of` back to an entry.

    Raises:
        L2R2Error: when a value is not valid.
        KeyError: when a field is missing.
        TypeError: when a field has the wrong type.
        ValueError: when a field cannot be converted.
    """
    about = (record["normalized"], size_of(record, record["file"]), record["failure"], record["masks"])
    return checked_entry(record["boxes"], record["scores"], record["labels"], record["file"], *about)


_READERS: dict[str, Callable[[Any], Iterable[tuple[str, BoxEntry]]]] = {
    "MegaDetector": read_megadetector,
    "SpeciesNet": read_speciesnet,
    "COCO": _read_coco,
    "plain xyxy": _read_xyxy,
    "COCO results": read_coco_results,
    "Label Studio": read_label_studio,
}


class BoxColumns(NamedTuple):
    """The four columns that hold a box.

    Attributes:
        names: the columns of the first corner, then those of the second corner, or of width and height.
        has_sides: whether the last two are width and height.
    """

    names: tuple[str, ...]
    has_sides: bool


def box_columns(rows: Iterable[Mapping[str, Any]], source: str) -> BoxColumns | None:
    """Find the four columns that hold a box, by their usual names; None if there are none.

    Case, spaces, underscores and the prefixes `bbox` and `box` do not matter.

    Raises:
        L2R2Error: when the columns of a box are incomplete, ambiguous, or in an unsupported form.

    >>> box_columns([{"file_name": "a.jpg", "bbox_x": 1, "bbox_y": 2, "bbox_w": 3, "bbox_h": 4}], "metadata.csv")
    BoxColumns(names=('bbox_x', 'bbox_y', 'bbox_w', 'bbox_h'), has_sides=True)
    """
    names: dict[str, str] = {}
    seen = dict.fromkeys(name for row in rows for name in row if isinstance(name, str) and name != "boxes")
    for name in seen:
        plain = re.sub(r"[\s_-]", "", name.lower())
        plain = re.sub(r"^b?box(?=.)", "", plain)
        if plain in _KNOWN and names.setdefault(plain, name) != name:
            raise L2R2Error(f"{source}: the columns {names[plain]} and {name} could both belong to the box; remove one of them.")
    complete = [columns for columns in CORNERS if set(columns) <= set(names)]
    complete = complete or [columns for columns in SIDES if set(columns) <= set(names)]
    if len(complete) > 1:
        first, second = (", ".join(columns) for columns in complete[:2])
        raise L2R2Error(f"{source}: both {first} and {second} could be the box; remove one of them.")
    if complete:
        return BoxColumns(tuple(names[column] for column in complete[0]), complete[0] in SIDES)
    if unsupported := [name for name in seen if re.sub(r"[\s_-]", "", name.lower()) in _LIKE_A_BOX]:
        raise L2R2Error(f"{source}: {', '.join(unsupported)} looks like a box in an unsupported form; {COLUMNS}.")
    if partial := [names[column] for column in names if column in _OF_A_BOX]:
        raise L2R2Error(f"{source}: the box is incomplete, with only {', '.join(partial)}; {COLUMNS}.")
    return None


def _csv_rows(file: Iterable[str], path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV, stripped of spaces around names and values.

    Raises:
        L2R2Error: when the header repeats a name or is not separated by commas, or a row has more values than the header.
    """
    reader = csv.DictReader(file, skipinitialspace=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    if repeated := [name for name in header if name and header.count(name) > 1]:
        raise L2R2Error(f"{path}: has two columns called {repeated[0]}; rename or remove one.")
    if len(header) == 1 and (separator := next((c for c in ";\t|" if c in header[0]), None)):
        raise L2R2Error(f"{path}: its columns are separated by {separator!r}; separate them with commas.")
    if "file_name" not in header and (usual := [name for name in header if re.sub(r"[\s_-]", "", name.lower()) in _FILES]):
        raise L2R2Error(f"{path}: has no column file_name; rename {usual[0]}.")
    rows = []
    for row in reader:
        if None in row:
            raise L2R2Error(
                f"{path}: line {reader.line_num} has more values than the header has names; quote values with commas."
            )
        rows.append({name.strip(): value.strip() if isinstance(value, str) else value for name, value in row.items()})
    return rows


def _row_boxes(row: Mapping[str, Any], columns: BoxColumns | None) -> tuple[list[Any], list[float], list[str]]:
    """Boxes xyxy, scores and labels of one row."""
    if (objects := row.get("objects")) is not None:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in objects["bbox"]]
        scores, labels = objects.get("score"), objects.get("label")
        scores = [1.0] * len(boxes) if scores is None else list(scores)
        return boxes, scores, [""] * len(boxes) if labels is None else list(labels)
    if (listed := row.get("boxes")) is not None:
        return list(listed), [1.0] * len(listed), [""] * len(listed)
    given = [] if columns is None else [row.get(name) for name in columns.names]
    if columns is None or all(value in (None, "") for value in given):
        return [], [], []
    x, y, right, bottom = (float(value) for value in given)  # type: ignore[arg-type]
    if columns.has_sides:
        right, bottom = x + right, y + bottom
    score = next((row[name] for name in row if isinstance(name, str) and name.lower() in SCORES), None)
    return [(x, y, right, bottom)], [1.0 if score in (None, "") else float(score)], [""]


def _json_line(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise L2R2Error(f"{path}: line {number} is not JSON ({error}).") from None

"""Read the formats of annotation tools: folders of YOLO, VOC and LabelMe files, Label Studio, CVAT, OpenImages, COCO results."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse
from xml.etree import ElementTree

from ..errors import L2R2Error
from ..images import IMAGE_SUFFIXES
from ..io import check_readable, parse_yaml, read_json, read_text
from .entries import checked_entry, size_of
from .table import ANY, BoxEntry

NAMES = ("classes.txt", "obj.names", "data.yaml", "dataset.yaml")  # of YOLO's classes, beside the labels or one folder up
OPENIMAGES = ("ImageID", "XMin", "XMax", "YMin", "YMax")
Entries = Iterable[tuple[str, BoxEntry]]


def read_folder(folder: Path) -> tuple[str, dict[str, BoxEntry]]:
    """Read a folder with one file per image: YOLO's .txt, Pascal VOC's .xml or LabelMe's .json.

    Returns:
        The name of the format, and the entries by path; those of YOLO end in `.*` for the suffix of the image.

    Raises:
        L2R2Error: when the folder has no such files, or of several formats, or a file is malformed; the message names the file.
    """
    found = {suffix: sorted(folder.rglob(f"*{suffix}")) for suffix in _OF_FOLDERS}
    found[".txt"] = [path for path in found[".txt"] if path.name not in NAMES]
    if not (given := [suffix for suffix, paths in found.items() if paths]):
        raise L2R2Error(
            f"{folder}: has no box files; a folder can be that of YOLO (.txt), Pascal VOC (.xml) or LabelMe (.json), and other "
            "formats are one file."
        )
    if len(given) > 1:
        raise L2R2Error(f"{folder}: has both {given[0]} and {given[1]} files; pass the folder of one format.")
    kind, read = _OF_FOLDERS[given[0]]
    names = _yolo_names(folder) if kind == "YOLO" else ()
    entries: dict[str, BoxEntry] = {}
    for path in found[given[0]]:
        check_readable(path)
        try:
            name, entry = read(path, path.relative_to(folder), names)
        except L2R2Error as error:
            raise L2R2Error(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, ElementTree.ParseError) as error:
            raise L2R2Error(f"{path}: is not a {kind} file ({type(error).__name__}: {error}).") from None
        if name in entries:
            raise L2R2Error(f"{path}: is for {name}, as another file of this folder is; remove one of them.")
        entries[name] = entry
    return kind, entries


def _yolo_names(folder: Path) -> Sequence[str]:
    for place in (folder, folder.parent, folder.parent.parent):
        for path in (place / name for name in NAMES):
            if path.is_file():
                text = read_text(path)
                if path.suffix != ".yaml":
                    return [line.strip() for line in text.splitlines() if line.strip()]
                found = parse_yaml(text, str(path))
                names = found.get("names") or () if isinstance(found, dict) else ()
                return [str(names[k]) for k in sorted(names)] if isinstance(names, dict) else [str(name) for name in names]
    return ()


def _read_yolo(path: Path, inside: Path, names: Sequence[str]) -> tuple[str, BoxEntry]:
    """Lines `class cx cy width height [score]`, or `class x y x y x y ...` for polygons, relative to the image."""
    boxes, scores, labels = [], [], []
    for line in read_text(path).splitlines():
        if not (values := line.split()):
            continue
        number, *numbers = int(values[0]), *map(float, values[1:])
        if len(numbers) in (4, 5):
            x, y, width, height = numbers[:4]
            boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            boxes.append((min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])))
        else:
            raise L2R2Error(f"the line {line!r} is not `class x y width height`.")
        if any(not -0.5 <= v <= 1.5 for v in boxes[-1]):
            raise L2R2Error(f"the line {line!r} is in pixels, but this format uses fractions of the image's width and height.")
        scores.append(numbers[4] if len(numbers) == 5 else 1.0)
        labels.append(names[number] if 0 <= number < len(names) else "")
    parts = inside.with_suffix(ANY).parts
    if "labels" in parts:  # the images are in a folder beside it
        parts = parts[len(parts) - parts[::-1].index("labels") :]
    name = "/".join(parts)
    return name, checked_entry(boxes, scores, labels, name, normalized=True)


def _read_voc(path: Path, inside: Path, names: Sequence[str]) -> tuple[str, BoxEntry]:
    """Pascal VOC counts pixels from 1, and its maximum is inside the box."""
    root = ElementTree.fromstring(read_text(path))
    file = root.findtext("filename") or inside.with_suffix(ANY).name
    boxes, labels = [], []
    for one in root.iter("object"):
        x0, y0, x1, y1 = (float(one.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((x0 - 1, y0 - 1, x1, y1))
        labels.append(one.findtext("name") or "")
    size = {side: int(text) for side in ("width", "height") if (text := root.findtext(f"size/{side}")) and int(text)}
    name = (inside.parent / file).as_posix()
    return name, checked_entry(boxes, [1.0] * len(boxes), labels, name, image_size=size_of(size, name))


def _read_labelme(path: Path, inside: Path, names: Sequence[str]) -> tuple[str, BoxEntry]:
    data = read_json(path)
    if not isinstance(data, dict) or not {"imagePath", "shapes"} <= set(data):
        raise L2R2Error("is not a LabelMe file, and other JSON is not read by folder; pass a box file by itself.")
    name = (inside.parent / PurePosixPath(data["imagePath"].replace("\\", "/")).name).as_posix()
    boxes = []
    for shape in data["shapes"]:
        xs, ys = zip(*shape["points"])
        if shape.get("shape_type") == "circle":  # center and a point on the circle
            radius = ((xs[0] - xs[1]) ** 2 + (ys[0] - ys[1]) ** 2) ** 0.5
            xs, ys = (xs[0] - radius, xs[0] + radius), (ys[0] - radius, ys[0] + radius)
        boxes.append((min(xs), min(ys), max(xs), max(ys)))
    labels = [shape["label"] for shape in data["shapes"]]
    size = {"width": data.get("imageWidth"), "height": data.get("imageHeight")}
    return name, checked_entry(boxes, [1.0] * len(boxes), labels, name, image_size=size_of(size, name))


_OF_FOLDERS: dict[str, tuple[str, Callable[[Path, Path, Sequence[str]], tuple[str, BoxEntry]]]] = {
    ".txt": ("YOLO", _read_yolo),
    ".xml": ("Pascal VOC", _read_voc),
    ".json": ("LabelMe", _read_labelme),
}


def read_label_studio(tasks: list[dict[str, Any]]) -> Entries:
    """Read Label Studio's JSON export: the first annotation of each task that was not canceled, else its first prediction."""
    for task in tasks:
        source = next((value for value in task["data"].values() if isinstance(value, str) and "." in value), None)
        if source is None:
            raise L2R2Error(f"the data of task {task.get('id')} names no image.")
        query = parse_qs(urlparse(source).query)
        name = unquote(query["d"][0] if "d" in query else urlparse(source).path).lstrip("/")
        if name.startswith("data/upload/"):  # in Label Studio's own folder, under a prefix
            name = re.sub("^[0-9a-f]{8}-", "", PurePosixPath(name).name)
        made = [a for a in task.get("annotations") or [] if not a.get("was_cancelled")] or task.get("predictions") or []
        boxes, labels, scores = [], [], []
        size = None
        for one in made[0]["result"] if made else ():
            value = one.get("value", {})
            if one.get("type") != "rectanglelabels":
                continue
            if value.get("rotation"):
                raise L2R2Error(f"a box of {name} is rotated; export boxes without rotation.")
            x, y = value["x"] / 100, value["y"] / 100
            boxes.append((x, y, x + value["width"] / 100, y + value["height"] / 100))
            labels.append((value.get("rectanglelabels") or [""])[0])
            scores.append(one.get("score", 1.0))
            size = (one.get("original_height"), one.get("original_width"))
        about = {} if size is None else {"height": size[0], "width": size[1]}
        yield name, checked_entry(boxes, scores, labels, name, True, size_of(about, name))


def read_coco_results(results: list[dict[str, Any]]) -> Entries:
    """Read a list of COCO results whose `image_id` is the name of the image, with or without its suffix."""
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for one in results:
        by_image.setdefault(one["image_id"], []).append(one)
    for image, found in by_image.items():
        if not isinstance(image, str):
            raise L2R2Error(
                f"image_id {image!r} is not the name of an image; put the results under `annotations` of the COCO file that "
                "lists the images."
            )
        name = image if PurePosixPath(image).suffix.lower() in IMAGE_SUFFIXES else f"{image}{ANY}"
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in found)]
        yield name, checked_entry(boxes, [one["score"] for one in found], [""] * len(found), name)


def read_cvat(path: Path) -> dict[str, BoxEntry]:
    """Read the XML of CVAT for images (1.1); of polygons, the box around them is read.

    Raises:
        L2R2Error: when the file is not that of CVAT for images, or malformed.
    """
    check_readable(path)
    entries: dict[str, BoxEntry] = {}
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotations" or root.find("track") is not None or root.find("image") is None:
            raise L2R2Error("is not an export of CVAT for images (1.1); for Pascal VOC, pass the folder of the XML files.")
        for image in root.iter("image"):
            name = image.attrib["name"]
            found = [(shape.attrib["label"], _cvat_box(shape)) for shape in image if shape.tag in ("box", "polygon")]
            size: dict[str, Any] = {side: int(image.attrib[side]) for side in ("width", "height") if side in image.attrib}
            labels = [label for label, _ in found]
            entries[name] = checked_entry(
                [box for _, box in found], [1.0] * len(found), labels, name, image_size=size_of(size, name)
            )
    except L2R2Error as error:
        raise L2R2Error(f"{path}: {error}") from None
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise L2R2Error(f"{path}: is not an export of CVAT for images ({type(error).__name__}: {error}).") from None
    return entries


def _cvat_box(shape: ElementTree.Element) -> tuple[float, float, float, float]:
    if shape.tag == "box":
        if float(shape.attrib.get("rotation", 0)):
            raise L2R2Error("a box is rotated; export boxes without rotation.")
        x0, y0, x1, y1 = (float(shape.attrib[side]) for side in ("xtl", "ytl", "xbr", "ybr"))
        return x0, y0, x1, y1
    points = [tuple(map(float, point.split(","))) for point in shape.attrib["points"].split(";")]
    xs, ys = zip(*points)
    return min(xs), min(ys), max(xs), max(ys)


def is_openimages(path: Path) -> bool:
    """Whether a CSV has the columns of OpenImages."""
    check_readable(path)
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        return set(OPENIMAGES) <= set(next(csv.reader(file), ()))


def read_openimages(path: Path) -> Entries:
    """Read OpenImages' CSV: relative boxes of images by id, without a suffix."""
    by_image: dict[str, list[dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            by_image.setdefault(row["ImageID"], []).append(row)
    for image, found in by_image.items():
        boxes = [tuple(float(row[side]) for side in ("XMin", "YMin", "XMax", "YMax")) for row in found]
        scores = [float(row.get("Score") or row.get("Confidence") or 1) for row in found]
        name = f"{image}{ANY}"
        yield name, checked_entry(boxes, scores, [row.get("LabelName") or "" for row in found], name, normalized=True)

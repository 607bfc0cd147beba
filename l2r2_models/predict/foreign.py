"""Prediction files in the formats of other tools: MegaDetector 1.6 and COCO."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from .prediction import LOCALIZER_FAILED, NO_BOX, NO_FG
from .rendering import About, Ids, line

OBJECT = "object"  # category of a box without a label
MEGADETECTOR = {"animal": 1, "person": 2, "vehicle": 3}  # MegaDetector's own categories, which other tools expect
RATIO = 6  # decimals of a relative coordinate
Box = tuple[float, float, float, float]


def write_megadetector(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    """Write MegaDetector's batch output format, version 1.6, as read by Timelapse and AddaxAI.

    Each box is a detection, and its classes are its classifications, best first. An image that was classified as a whole because
    no box was given is one detection that covers it; if boxes were looked for and none was found, it has no detections. A failed
    localizer is a failure. Source: https://lila.science/megadetector-output-format.
    """
    found: dict[str, int] = {}
    classes = Ids({name: i for i, name in enumerate(about.header["labels"])})
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f'{{"info": {line(_info(about))},\n"images": [')
        before = "\n"
        for record in records:
            file.write(before + line({"file": about.name_of(record), **_detections(record, found, classes)}))
            before = ",\n"
        categories = {str(number): name for name, number in sorted(found.items(), key=itemgetter(1))} or {"1": "animal"}
        file.write(f'\n],\n"detection_categories": {line(categories)},\n')
        file.write(f'"classification_categories": {line(classes.names())}}}\n')


def _info(about: About) -> dict[str, Any]:
    localizer = (about.header["localizer"] or {}).get("localizer", "")
    detector = about.detector or localizer
    time = {} if about.completed is None else {"classification_completion_time": _time(about.completed)}
    return {
        "format_version": "1.6",
        **({"detector": detector} if detector else {}),
        "classifier": Path(about.header["model"]).name,
        **time,
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _detections(record: Mapping[str, Any], found: dict[str, int], classes: Ids) -> dict[str, Any]:
    """Return an image's detections, or its failure."""
    reasons = [o["reason"] for o in record.get("objects", ())]
    failed = next((reason for reason in reasons if reason.startswith(LOCALIZER_FAILED)), None)
    if failure := record.get("failure", failed):
        return {"failure": failure, "detections": None}
    detections = []
    for o, (x0, y0, x1, y1) in boxed(record):
        width, height = record["width"], record["height"]
        box = (x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height)
        detections.append(
            {
                "category": _category(o.get("box_label", OBJECT), found),
                "conf": float(o.get("box_score", 1.0)),
                "bbox": [round(value, RATIO) for value in box],
                "classifications": [[str(classes[label]), score] for label, score in _classes(o)],
            }
        )
    return {"detections": detections}


def _classes(o: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the labels of an object with their scores, best first; a group comes before its classes, and `unknown` is alone."""
    if o["label"] != o["top"][0]["label"]:
        yield o["label"], o["score"]
    for one in () if o["source"] == "abstained" else o["top"]:
        yield one["label"], one["score"]


def _category(name: str, found: dict[str, int]) -> str:
    """Return the id of a category, and register it in `found`."""
    if name not in found:
        found[name] = MEGADETECTOR.get(name) or 1 + max([*MEGADETECTOR.values(), *found.values()])
    return str(found[name])


def write_coco(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    """Write COCO's format; its `annotations` are a list of COCO results, with the score of the class as `score`.

    An image that was classified as a whole because no box was given has one annotation that covers it.
    """
    classes = Ids({name: i for i, name in enumerate(about.header["labels"], 1)})
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file, _spool(path.parent) as later:
        info = {"description": f"predictions of {about.header['model']}"}
        file.write(f'{{"info": {line(info)},\n"images": [')
        before = between = "\n"
        count = 0
        for number, record in enumerate(records, 1):
            image = {"id": number, "file_name": about.name_of(record)}
            image |= {key: record[key] for key in ("width", "height", "failure") if key in record}
            file.write(before + line(image))
            before = ",\n"
            for o, box in boxed(record):
                count += 1
                later.write(between + line({"id": count, "image_id": number, **_annotation(o, box, classes)}))
                between = ",\n"
        file.write('\n],\n"annotations": [')
        later.seek(0)
        shutil.copyfileobj(later, file)
        categories = [{"id": number, "name": name} for name, number in classes.items()]
        file.write(f'\n],\n"categories": {line(categories)}}}\n')


def _spool(folder: Path) -> TextIO:
    """Open a temporary file for what comes after the images."""
    return tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", errors="backslashreplace")


def _annotation(o: Mapping[str, Any], box: Box, classes: Ids) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    width, height = round(x1 - x0, 2), round(y1 - y0, 2)
    return {
        "category_id": classes[o["label"]],
        "bbox": [x0, y0, width, height],
        "area": round(width * height, 2),
        "iscrowd": 0,
        "score": o["score"],
        **({"box_score": o["box_score"]} if "box_score" in o else {}),
    }


def boxed(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Box]]:
    """Yield the objects of an image with their boxes xyxy in pixels, clipped to the image.

    An object without a box is the whole image, unless boxes were looked for and none was found.
    """
    for o in record.get("objects", ()):
        width, height = record["width"], record["height"]
        if "box" in o:
            x0, y0, x1, y1 = o["box"]
            yield o, (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        elif "fg" in o or o["reason"].startswith((NO_BOX, NO_FG)):
            yield o, (0.0, 0.0, float(width), float(height))

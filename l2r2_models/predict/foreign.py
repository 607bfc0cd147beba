"""Prediction files in the formats of other tools: MegaDetector 1.6 and COCO."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

from ..boxes import Frame
from .prediction import LOCALIZER_FAILED, NO_BOX, NO_FG
from .rendering import About, Ids, line
from .rules import UNKNOWN

OBJECT = "object"  # category of a box without a label
MEGADETECTOR = {"animal": 1, "person": 2, "vehicle": 3}  # MegaDetector's own categories, which other tools expect
RATIO = 6  # decimals of a relative coordinate
Box = tuple[float, float, float, float]


def write_megadetector(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    """Write MegaDetector's batch output format, version 1.6, as read by Timelapse and AddaxAI.

    Each box is a detection, and its classes are its classifications, best first. An image that was classified as a whole because
    no box was given is one detection that covers it; if boxes were looked for and none was found, it has no detections. A failed
    localizer is a failure. The frames of a video are one entry, after the images. Category ids of the input file are kept.
    Source: https://lila.science/megadetector-output-format.
    """
    known = about.categories or MEGADETECTOR
    found, used = Ids({name: int(number) for name, number in known.items()}), set(about.categories)
    classes = Classes(about.header, first=0)
    videos: dict[str, dict[str, Any]] = {}
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f'{{"info": {line(_info(about))},\n"images": [')
        before = "\n"
        for record in records:
            detections = _detections(record, found, used, classes)
            if "frame" in record:
                _add_frame(videos, Frame(**record["frame"]), detections)
                continue
            file.write(before + line({"file": about.name_of(record), **detections}))
            before = ",\n"
        for video in videos.values():
            file.write(before + line(_finished(video)))
            before = ",\n"
        categories = {str(number): name for name, number in sorted(found.items(), key=itemgetter(1)) if name in used}
        file.write(f'\n],\n"detection_categories": {line(categories or {"1": "animal"})},\n')
        file.write(f'"classification_categories": {line(classes.names())}}}\n')


class Classes(Ids):
    """Numbers of classes and groups, and of no class; a class that is called `unknown` is told from an abstained prediction."""

    def __init__(self, header: Mapping[str, Any], first: int) -> None:
        super().__init__({name: i for i, name in enumerate(header["labels"], first)})
        groups = header["settings"].get("ancestors", {}).values()
        taken = {*header["labels"], *(name for named in groups for name in named)}
        self.abstained = UNKNOWN if UNKNOWN not in taken else f"{UNKNOWN} (abstained)"

    def of(self, o: Mapping[str, Any]) -> int:
        """Return the number of an object's label."""
        return self[self.abstained if o["source"] == "abstained" else o["label"]]


def _add_frame(videos: dict[str, dict[str, Any]], frame: Frame, found: dict[str, Any]) -> None:
    """Add the detections of a frame, or its failure, to its video."""
    name = frame.video.replace("\\", "/")
    start = {"file": name, "frame_rate": frame.rate, "frames_processed": [], "failure": None, "detections": []}
    video = videos.setdefault(name, start)
    if found["detections"] is None:
        video["failure"] = video["failure"] or found["failure"]
        return
    video["frames_processed"].append(frame.number)
    video["detections"] += [{**detection, "frame_number": frame.number} for detection in found["detections"]]


def _finished(video: dict[str, Any]) -> dict[str, Any]:
    """Return a video in the order of its frames; it failed if all its frames did."""
    if not video["frames_processed"]:
        return {"file": video["file"], "failure": video["failure"], "detections": None}
    detections = sorted(video["detections"], key=itemgetter("frame_number"))
    frames = {"frame_rate": video["frame_rate"], "frames_processed": sorted(video["frames_processed"])}
    return {"file": video["file"], **frames, "detections": detections}


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


def _detections(record: Mapping[str, Any], found: Ids, used: set[str], classes: Classes) -> dict[str, Any]:
    """Return an image's detections, or its failure, and add their categories to `used`."""
    reasons = [o["reason"] for o in record.get("objects", ())]
    failed = next((reason for reason in reasons if reason.startswith(LOCALIZER_FAILED)), None)
    if failure := record.get("failure", failed):
        return {"failure": failure, "detections": None}
    detections = []
    for o, (x0, y0, x1, y1) in boxed(record):
        width, height = record["width"], record["height"]
        used.add(category := o.get("box_label", OBJECT))
        box = (x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height)
        detections.append(
            {
                "category": str(found[category]),
                "conf": float(o.get("box_score", 1.0)),
                "bbox": [round(value, RATIO) for value in box],
                "classifications": [[str(number), score] for number, score in _classes(o, classes)],
            }
        )
    return {"detections": detections}


def _classes(o: Mapping[str, Any], classes: Classes) -> Iterator[tuple[int, float]]:
    """Yield the numbers of an object's classes with their scores, best first; a group comes before them, `unknown` is alone."""
    if o["source"] == "abstained" or o["label"] != o["top"][0]["label"]:
        yield classes.of(o), o["score"]
    for one in () if o["source"] == "abstained" else o["top"]:
        yield classes[one["label"]], one["score"]


def write_coco(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    """Write COCO's format; its `annotations` are a list of COCO results, with the score of the class as `score`.

    An image that was classified as a whole because no box was given has one annotation that covers it.
    """
    classes = Classes(about.header, first=1)
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


def _annotation(o: Mapping[str, Any], box: Box, classes: Classes) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    width, height = round(x1 - x0, 2), round(y1 - y0, 2)
    return {
        "category_id": classes.of(o),
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

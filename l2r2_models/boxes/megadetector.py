"""Read the formats of MegaDetector, for images and videos, and of SpeciesNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..errors import L2R2Error
from .entries import checked_entry, is_number, size_of
from .table import BoxEntry, Frame


def read_megadetector(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    """Read MegaDetector's batch output; each frame of a video gets an entry of its own, see `frame_name`."""
    names = data.get("detection_categories", {})
    for image in data["images"]:
        if not is_video(image):
            yield image["file"], _relative_entry(image, names, image.get("failure"), image["file"])
            continue
        by_frame: dict[int, list[dict[str, Any]]] = {number: [] for number in _processed(image)}
        for found in image.get("detections") or []:
            by_frame.setdefault(_frame_number(found["frame_number"], image["file"]), []).append(found)
        for number, detections in sorted(by_frame.items()):
            name = frame_name(image["file"], number)
            yield name, _relative_entry({**image, "detections": detections}, names, None, name)


def read_frames(data: dict[str, Any]) -> dict[str, Frame]:
    """Return the video and the number of each frame, by the name of its entry."""
    frames = {}
    for image in filter(is_video, data["images"]):
        rate, processed = image.get("frame_rate"), _processed(image)
        if not is_number(rate) or rate <= 0:
            raise L2R2Error(f"the frame_rate of {image['file']}, {rate!r}, is not a positive number.")
        found = {_frame_number(d["frame_number"], image["file"]) for d in image.get("detections") or []}
        for number in sorted(found.union(processed)):
            frames[frame_name(image["file"], number)] = Frame(image["file"], number, rate)
    return frames


def read_categories(data: dict[str, Any]) -> dict[str, str]:
    """Return the ids of the detection categories by name."""
    found = data.get("detection_categories", {})
    return {name: number for number, name in found.items() if isinstance(name, str) and name and number.isdecimal()}


def is_video(image: Mapping[str, Any]) -> bool:
    """Whether the entry of a MegaDetector file is that of a video that was processed."""
    found = image.get("detections") or []
    return "frames_processed" in image or any("frame_number" in d for d in found)


def frame_name(video: str, number: int) -> str:
    """Return the path of an extracted frame, as MegaDetector's `video_to_frames` names it.

    >>> frame_name("site/clip.mp4", 20)
    'site/clip.mp4/frame000020.jpg'
    """
    return str(PurePosixPath(video.replace("\\", "/")) / f"frame{number:06d}.jpg")


def _processed(image: Mapping[str, Any]) -> Sequence[int]:
    return [_frame_number(number, image["file"]) for number in image.get("frames_processed") or []]


def _frame_number(number: Any, file: str) -> int:
    if not is_number(number) or number < 0 or number != int(number):
        raise L2R2Error(f"the frame number {number!r} of {file} is not a whole number from 0.")
    return int(number)


def read_speciesnet(data: dict[str, Any]) -> Iterable[tuple[str, BoxEntry]]:
    """Read SpeciesNet's predictions."""
    for image in data["predictions"]:
        failures = None if image.get("detections") else image.get("failures")  # the classifier may fail on an image with boxes
        failure = ", ".join(failures) if isinstance(failures, list) else failures
        yield image["filepath"], _relative_entry(image, {}, failure, image["filepath"])


def _relative_entry(image: dict[str, Any], names: dict[str, str], failure: str | None, file: str) -> BoxEntry:
    found = image.get("detections") or []
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (d["bbox"] for d in found)]
    labels = [d.get("label") or names.get(str(d.get("category", "")), "") for d in found]
    if any(abs(v) > 10 for box in boxes for v in box):  # slightly outside [0, 1] is common, this far is not
        raise L2R2Error(f"the boxes of {file} are in pixels, but this format uses fractions of the image's width and height.")
    masks = [d.get("mask") for d in found]
    return checked_entry(boxes, [d.get("conf", 1.0) for d in found], labels, file, True, size_of(image, file), failure, masks)

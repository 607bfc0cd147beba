"""Entries of box files, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import L2R2Error
from .rle import Rle
from .table import BoxEntry


def checked_entry(
    boxes: Iterable[Any],
    scores: Iterable[float],
    labels: Iterable[str],
    file: str,
    normalized: bool = False,
    image_size: tuple[int, int] | None = None,
    failure: str | None = None,
    masks: Iterable[Any] = (),
) -> BoxEntry:
    """Create the entry of an image; exact duplicates are dropped.

    Raises:
        L2R2Error: when a value is not valid; the message names the image.
    """
    boxes, scores, labels, masks = [tuple(box) for box in boxes], list(scores), list(labels), list(masks)
    for box in boxes:
        if len(box) != 4 or not all(map(is_number, box)):
            raise L2R2Error(f"the box {list(box)} of {file} is not four finite numbers.")
    if not len(boxes) == len(scores) == len(labels):
        raise L2R2Error(f"{file} has {len(boxes)} boxes and {len(scores)} scores.")
    for score in scores:
        if not is_number(score) or not 0 <= score <= 1.001:  # rounding may exceed 1 slightly
            raise L2R2Error(f"the score {score!r} of {file} is not between 0 and 1.")
    if not all(isinstance(text, str) for text in (*labels, failure or "")):
        raise L2R2Error(f"a label or the failure of {file} is not text.")
    numbers = [tuple(map(float, box)) for box in boxes], [float(score) for score in scores]
    objects: list[Any] = list(zip(*numbers, labels, masks or [None] * len(boxes)))
    objects = list({repr(one): one for one in objects}.values())  # drop exact duplicates
    pixels = tuple(box for box, *_ in objects)
    try:
        runs = tuple(None if mask is None else Rle.from_coco(mask) for *_, mask in objects)
    except L2R2Error as error:
        raise L2R2Error(f"{file}: {error}") from None
    of_each = tuple(one[1] for one in objects), tuple(one[2] for one in objects)
    return BoxEntry(pixels, *of_each, normalized, image_size, failure, runs if any(runs) else ())


def size_of(image: Mapping[str, Any], file: str) -> tuple[int, int] | None:
    """`(height, width)`, or None unless both are given."""
    height, width = image.get("height"), image.get("width")
    if height is None or width is None:
        return None
    if not all(is_number(side) and side >= 1 and side == int(side) for side in (height, width)):
        raise L2R2Error(f"the size of {file}, {width!r}x{height!r}, is not a whole number of pixels.")
    return int(height), int(width)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

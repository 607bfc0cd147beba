"""The object's mask on the page: what a visitor paints or erases."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..images import image_tensor
from ..models.l2r2 import L2R2

MOST_POINTS = 10_000
BAD_STROKE = "That stroke cannot be read; paint on the photo again."


class Stroke(NamedTuple):
    """A stroke of the brush.

    Attributes:
        points: where the brush went, x and y relative to the width and height of the photo.
        brush: diameter relative to the width of the photo.
        erase: whether it erases instead of painting.
    """

    points: tuple[tuple[float, float], ...]
    brush: float
    erase: bool

    @classmethod
    def read(cls, sent: Any) -> Stroke:
        """Check what a browser sent.

        Raises:
            L2R2Error: when it is not a stroke.
        """
        match sent:
            case {"points": [_, *_] as points, "brush": int() | float() as brush, "erase": bool() as erase}:
                pairs = [point for point in points if isinstance(point, list) and len(point) == 2]
                shares = [brush, *(value for pair in pairs for value in pair)]
                if len(pairs) == len(points) <= MOST_POINTS and all(map(_is_share, shares)):
                    return cls(tuple((x, y) for x, y in pairs), brush, erase)
        raise L2R2Error(BAD_STROKE)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1


def uses_mask(model: L2R2) -> bool:
    """Whether fg sees the object through its mask, so that it matters which pixels the mask has.

    >>> from l2r2_models import L2R2
    >>> uses_mask(L2R2("resnet10t", num_classes=2))
    False
    """
    return "fg" in model.branches and (model.view_spec.fg.erases or model.view_spec.fg.takes_mask)


def painted(mask: Tensor, stroke: Stroke) -> Tensor:
    """Return the mask `[H, W]` bool after a stroke.

    >>> painted(torch.zeros(3, 3, dtype=torch.bool), Stroke(((0.5, 0.5),), 0.3, False)).sum()
    tensor(1)
    """
    height, width = mask.shape
    picture = Image.fromarray(mask.numpy())  # one bit per pixel
    draw, value = ImageDraw.Draw(picture), 0 if stroke.erase else 1
    places = [(x * width - 0.5, y * height - 0.5) for x, y in stroke.points]  # centers of pixels are at whole numbers
    radius = max(stroke.brush * width - 1, 0) / 2  # from the center of one pixel to that of another
    draw.line(places, fill=value, width=round(2 * radius + 1))
    for x, y in places:  # round ends and corners
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value)
    return image_tensor(picture.convert("RGB"))[:, :, 0] > 0


def box_of(mask: Tensor) -> tuple[float, ...] | None:
    """The tight box of a mask, xyxy in pixels; None if it is empty."""
    found = Detections.from_mask(mask).boxes.tolist()
    return tuple(found[0]) if found else None


def rectangle(box: tuple[float, ...] | None, height: int, width: int) -> Tensor:
    """The mask `[H, W]` bool of a box, or an empty one."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    if box is not None:
        x0, y0, x1, y1 = Detections.from_lists([box], (height, width)).windows()[0][0].tolist()
        mask[y0:y1, x0:x1] = True
    return mask

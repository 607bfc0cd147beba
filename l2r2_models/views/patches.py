"""Decode the parts of an image file that its views show, at no higher resolution than needed (`docs/method.md`, Views)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from l2r2_kernels.roi_views.reference import integer_boxes
from PIL import Image, ImageOps
from torch import Tensor

from ..images import LazyImage, image_tensor
from .spec import ViewSpec

Window = tuple[int, int, int, int]
SCALES = (8, 4, 2)  # at which JPEGs are decoded
DETAIL = 2  # a reduced part has at least this many pixels per pixel of the view on its longer side


@dataclass(frozen=True, eq=False)
class Patches:
    """The windows of one image that `make_views` cuts, as a substitute for the whole image.

    Attributes:
        size: `(height, width)` of the image.
        parts: uint8 pixels `[h, w, 3]` by window (integer xyxy in pixels of the image), possibly at a reduced resolution.
    """

    size: tuple[int, int]
    parts: Mapping[Window, Tensor]

    @property
    def pixels(self) -> int:
        """The number of pixels in all parts."""
        return sum(part.shape[0] * part.shape[1] for part in self.parts.values())


def takes_patches(spec: ViewSpec, branches: Sequence[str]) -> bool:
    """Return whether these views can be cut from patches: if no pixels are replaced by the fill color."""
    return "bg" not in branches and not ("fg" in branches and spec.fg.erases)


def decode_patches(image: LazyImage, boxes: Tensor | None, spec: ViewSpec, branches: Sequence[str]) -> Patches:
    """Decode what the views of an image show: the whole image, and each box if the fg view is a crop.

    Args:
        image: the image file.
        boxes: `[V, 4]` xyxy pixels of the upright image, or None; a box without a pixel in the image shows the whole image.
        spec: how views are cut, see `takes_patches`.
        branches: which views are cut.

    Raises:
        ImageError: when the image cannot be decoded.

    >>> image = LazyImage(torch.zeros(800, 600, 3, dtype=torch.uint8))
    >>> patches = decode_patches(image, torch.tensor([[0.0, 0, 90, 90]]), ViewSpec(size=32, decode="scaled"), ("full", "fg"))
    >>> {window: tuple(part.shape) for window, part in patches.parts.items()}
    {(0, 0, 600, 800): (100, 76, 3), (0, 0, 90, 90): (90, 90, 3)}
    """
    whole = (0, 0, image.size[1], image.size[0])
    shown = [(whole, "full" if "full" in branches else "fg")]
    if "fg" in branches and spec.fg.crops and boxes is not None:
        height, width = (torch.full((len(boxes),), side) for side in image.size)
        found = zip(*(ends.tolist() for ends in integer_boxes(boxes, height, width, spec.margin)))
        shown += [(tuple(ends) if valid else whole, "fg") for ends, valid in found]
    windows: dict[Window, int] = {}
    for window, branch in shown:
        windows[window] = min(windows.get(window, SCALES[0]), scale_of(window, spec, branch))
    least = min(windows.values())
    if max(windows.values()) == 1:
        pixels = image.pixels()
        return Patches(image.size, {window: _crop(pixels, window) for window in windows})
    decoded = image.load(least)
    return Patches(image.size, {w: image_tensor(_part(decoded, w, least, scale, spec)) for w, scale in windows.items()})


def _crop(pixels: Tensor, window: Window) -> Tensor:
    """Return a copy, which does not keep the whole image in memory; the whole image itself is not copied."""
    x0, y0, x1, y1 = window
    part = pixels[y0:y1, x0:x1]
    return pixels if part.shape == pixels.shape else part.clone()


def scale_of(window: Window, spec: ViewSpec, branch: str) -> int:
    """Return the factor by which a window is reduced before the view of a branch is cut."""
    sides = window[2] - window[0], window[3] - window[1]
    side = max(sides) if spec.square else min(sides)
    return next((s for s in SCALES if spec.decode == "scaled" and side >= s * DETAIL * spec.size_of(branch)), 1)


def _part(decoded: Image.Image, window: Window, decoded_at: int, scale: int, spec: ViewSpec) -> Image.Image:
    """Return a window reduced by `scale`, from the image decoded at `decoded_at`.

    Views are padded by whole pixels. The part of a square view therefore begins and ends on the pixel grid of the padded square,
    and contains some of the fill where the grid does not meet the window.
    """
    if decoded_at == scale == 1:
        return decoded.crop(window)
    sides = window[2] - window[0], window[3] - window[1]
    axes = [_axis(low, side, max(sides) if spec.square else side, scale) for low, side in zip(window, sides)]
    size = axes[0][0], axes[1][0]
    box = [end / decoded_at for end in (axes[0][1], axes[1][1], axes[0][2], axes[1][2])]
    if all(end.is_integer() for end in box) and size == (box[2] - box[0], box[3] - box[1]):
        return decoded if size == decoded.size else decoded.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    x0, y0 = (low // decoded_at for low in window[:2])
    x1, y1 = (-(-high // decoded_at) for high in window[2:])
    padded = [spec.square and side < max(sides) for side in sides]
    step = scale // decoded_at
    rest = tuple(-length % step if pads else 0 for length, pads in zip((x1 - x0, y1 - y0), padded))
    if step == 1 or any(rest):  # beyond a padded window is fill
        pixels = ImageOps.expand(decoded.crop((x0, y0, x1, y1)), (0, 0, *rest), spec.fill).reduce(step)
    else:
        pixels = decoded.reduce(step, (x0, y0, x1, y1))
    left, top = (2 if pads else 0 for pads in padded)
    ends = [(end - start) / step + border for end, start, border in zip(box, (x0, y0) * 2, (left, top) * 2)]
    canvas = ImageOps.expand(pixels, (left, top), spec.fill)
    return canvas.resize(size, Image.Resampling.BICUBIC, (ends[0], ends[1], ends[2], ends[3]))


def _axis(low: int, length: int, side: int, scale: int) -> tuple[int, float, float]:
    """Return the number of pixels of a part along one axis, and where they begin and end in the image.

    Args:
        low: start of the window.
        length: length of the window.
        side: length of the canvas, in the middle of which the window lies.
        scale: see `scale_of`.
    """
    cells = max(1, round(side / scale))
    cell, pad = side / cells, (side - length) // 2
    before = min(int(pad / cell), (cells - 1) // 2)  # whole pixels of padding, which `make_views` adds
    return cells - 2 * before, low - pad + before * cell, low - pad + (cells - before) * cell

"""Objects and backgrounds taken apart and put together: object-free backgrounds, and objects pasted on them.

Pixels are uint8 `[H, W, 3]`, a box is `[4]` xyxy in pixels, a mask is `[H, W]` bool. Nothing here draws at random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..images import FILL

MOST_COVERED = 4  # times the image: how large a background is resized as a whole
FEATHER, MASK_FEATHER = 0.08, 0.02  # of the shorter side of an object: what the soft edge of its box, or of its mask, takes
MARGIN = 0.1  # of a box's sides: what is removed around it, because shadows and loose edges show the object too


def background_of(pixels: Tensor, box: Tensor, mask: Tensor | None = None, *, margin: float = MARGIN) -> Tensor:
    """The image without its object: each box is filled in from what lies around it.

    The whole rectangle is filled, never an object's outline, which would give its class away. It is mirrored in from the four
    strips beside the box, the nearer edge weighing more, so that no hard seam draws the box either. "Noise or Signal" (Xiao et
    al. 2020, 3) tiles the largest free strip instead (Only-BG-T), which shows where the box was.

    Args:
        pixels: uint8 `[H, W, 3]`.
        box: `[4]` or `[N, 4]`: every object to remove, rounded outwards.
        mask: bool `[H, W]` of a single object; where it leaves the box, the box grows.
        margin: by how much each box grows, relative to its sides.

    Returns:
        uint8 `[H, W, 3]`, equal to `pixels` outside of the grown boxes; inside no value comes from within any of them. Where
        nothing lies outside, the image is the constant ImageNet mean.

    Raises:
        L2R2Error: no box covers a pixel, or the mask is not of the image's size.
    """
    windows = object_windows(pixels.shape[:2], box, mask, margin=margin)
    free = torch.ones(pixels.shape[:2], dtype=torch.bool)
    for x0, y0, x1, y1 in windows:
        free[y0:y1, x0:x1] = False
    out = pixels.clone()
    rest = pixels[free].float().mean(0) if free.any() else torch.tensor(FILL, dtype=torch.float32)
    for window in windows:
        x0, y0, x1, y1 = window
        out[y0:y1, x0:x1] = _mirrored_in(pixels, free, window, rest)
    return out


def paste_object(pixels: Tensor, box: Tensor, mask: Tensor | None, background: Tensor, *, feather: float | None = None) -> Tensor:
    """The object of one image, at its own place and size, on a background.

    Args:
        pixels: uint8 `[H, W, 3]`, the image with the object.
        box, mask: where it is; without a mask its whole box is taken along.
        background: uint8 `[h, w, 3]`; resized to cover `[H, W]` and cut to it around its center.
        feather: see `object_alpha`.

    Returns:
        uint8 `[H, W, 3]`: the background exactly where `object_alpha` is 0, the object exactly where it is 1.

    Raises:
        L2R2Error: the box covers no pixel, or the mask is not of the image's size.
    """
    alpha = object_alpha(pixels.shape[:2], box, mask, feather)[..., None]
    mixed = alpha * pixels.float() + (1 - alpha) * cover(background, pixels.shape[:2]).float()
    return mixed.round().to(torch.uint8)


def object_alpha(size: tuple[int, ...], box: Tensor, mask: Tensor | None, feather: float | None = None) -> Tensor:
    """How much of each pixel is the object: `[H, W]` float32 in [0, 1].

    With a mask that covers a pixel: 0 outside of it, at least 0.5 on it (thin parts stay), 1 where its edge is far; where the
    image's border cuts the object off is no edge. Else: 1 in the box (a crop to it stays what it was), falling to 0 outside.

    Args:
        size: `(H, W)`.
        box, mask: see `paste_object`.
        feather: width of the soft edge as a part of the object's shorter side, 0 is a hard edge; None is 0.08 around a box and
            0.02 inside a mask, where it takes from the object.
    """
    if feather is not None and not 0 <= feather <= 0.5:
        raise L2R2Error(f"feather must lie between 0 and 0.5, got {feather}.")
    height, width = size
    if mask is not None:
        _check_mask(mask, (height, width))
    if mask is None or not mask.any():
        return _box_alpha((height, width), _windows(box[None], (height, width))[0], FEATHER if feather is None else feather)
    x0, y0, x1, y1 = _windows(Detections.from_mask(mask).boxes, (height, width))[0]
    if (reach := round((MASK_FEATHER if feather is None else feather) * min(x1 - x0, y1 - y0))) == 0:
        return mask.float()
    around = F.pad(mask[None, None].float(), (reach,) * 4, mode="replicate")  # where the image cuts an object off is no edge
    side = 2 * reach + 1
    filled = F.avg_pool2d(F.avg_pool2d(around, (side, 1), 1), (1, side), 1)[0, 0]  # about half at a straight edge, 1 away from it
    return torch.where(filled > 1 - 1e-6, 1.0, filled.clamp(min=0.5)) * mask


def _box_alpha(size: tuple[int, int], window: tuple[int, int, int, int], feather: float) -> Tensor:
    x0, y0, x1, y1 = window
    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    outside = torch.maximum(torch.maximum(x0 - x, x - x1)[None], torch.maximum(y0 - y, y - y1)[:, None])  # below 0 in the box
    soft = feather * min(x1 - x0, y1 - y0)
    return (1 - outside / soft).clamp(0, 1) if soft > 0.5 else (outside < 0).float()


def cover(background: Tensor, size: tuple[int, ...]) -> Tensor:
    """A background `[h, w, 3]` resized so that it covers `(H, W)`, the rest cut off evenly: uint8 `[H, W, 3]`."""
    height, width = size
    if background.shape[:2] == (height, width):
        return background
    scale = max(height / background.shape[0], width / background.shape[1])
    new = [max(want, round(scale * have)) for want, have in zip((height, width), background.shape[:2])]
    if new[0] * new[1] > MOST_COVERED * height * width:  # of a very long background only the part that can be seen is resized
        have = [min(side, math.ceil(want / scale) + 2) for side, want in zip(background.shape[:2], (height, width))]
        y, x = ((side - part) // 2 for side, part in zip(background.shape[:2], have))
        background = background[y : y + have[0], x : x + have[1]]
        new = [max(want, round(scale * side)) for want, side in zip((height, width), have)]
    resized = F.interpolate(background.permute(2, 0, 1)[None].float(), new, mode="bilinear", antialias=True)[0]
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return resized[:, top : top + height, left : left + width].round().to(torch.uint8).permute(1, 2, 0).contiguous()


def object_windows(
    size: tuple[int, ...], box: Tensor, mask: Tensor | None = None, *, margin: float = 0.0
) -> list[tuple[int, int, int, int]]:
    """Integer windows of the objects in an image of `(H, W)`, that of a mask's object grown to hold the whole mask.

    Raises:
        L2R2Error: none covers a pixel, or the mask is not of the image's size.
    """
    size = (size[0], size[1])
    boxes = box.reshape(-1, 4).float()
    if mask is not None:
        _check_mask(mask, size)
        drawn = Detections.from_mask(mask).boxes
        both = torch.cat([boxes, drawn])
        single = len(boxes) == 1 and bool(boxes.isfinite().all())
        boxes = torch.cat([both[:, :2].amin(0), both[:, 2:].amax(0)])[None] if single and len(drawn) else both
    return _windows(boxes, size, margin)


def _windows(boxes: Tensor, size: tuple[int, int], margin: float = 0.0) -> list[tuple[int, int, int, int]]:
    windows, valid = Detections(boxes, torch.ones(len(boxes)), size).windows(margin)
    if not valid.any():
        raise L2R2Error(f"The object's box {boxes.tolist()} covers no pixel of an image of {size[1]}x{size[0]}.")
    return [tuple(window) for window in windows[valid].tolist()]


def _check_mask(mask: Tensor, size: tuple[int, int]) -> None:
    if tuple(mask.shape) != size:
        raise L2R2Error(f"The mask is {mask.shape[1]}x{mask.shape[0]}, its image {size[1]}x{size[0]}.")


def _mirrored_in(pixels: Tensor, free: Tensor, window: tuple[int, int, int, int], rest: Tensor) -> Tensor:
    """What fills a window: mirror images of the strips at its four sides, weighing 1 / distance^2; `rest` where none is free."""
    x0, y0, x1, y1 = window
    height, width = pixels.shape[:2]
    rows, columns = torch.arange(y0, y1), torch.arange(x0, x1)
    sum_of_weights = torch.zeros(y1 - y0, x1 - x0)
    total = torch.zeros(y1 - y0, x1 - x0, 3)
    for along, room, far in (  # (distance from the edge, pixels beyond it, position of those pixels)
        ((columns - x0)[None], x0, lambda t: (rows[:, None], x0 - 1 - t)),
        ((x1 - 1 - columns)[None], width - x1, lambda t: (rows[:, None], x1 + t)),
        ((rows - y0)[:, None], y0, lambda t: (y0 - 1 - t, columns[None])),
        ((y1 - 1 - rows)[:, None], height - y1, lambda t: (y1 + t, columns[None])),
    ):
        if room == 0:
            continue
        back = along % (2 * room)
        where = far(torch.minimum(back, 2 * room - 1 - back))
        # a strip that is narrower than the window repeats itself: it fills the edge, and leaves the middle to the others
        weight = free[where] * min(1.0, room / int(along.max() + 1)) / (along + 1.0) ** 2
        sum_of_weights += weight
        total += weight[..., None] * pixels[where].float()
    blended = total / sum_of_weights.clamp(min=1e-12)[..., None]
    return torch.where(sum_of_weights[..., None] > 0, blended, rest).round().to(torch.uint8)

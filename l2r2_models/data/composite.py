"""Removing objects from backgrounds, and pasting objects onto other backgrounds.

Pixels are uint8 `[H, W, 3]`, a box is `[4]` xyxy in pixels, a mask is `[H, W]` bool. Everything here is deterministic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..images import FILL

MOST_COVERED = 4  # a background that would be resized to more than this many times the image's area is cropped first
FEATHER, MASK_FEATHER = 0.08, 0.02  # width of the soft edge of a box and of a mask, relative to the object's shorter side
MARGIN = 0.1  # removed around a box, relative to its sides, because shadows and loose edges show the object too


def background_of(pixels: Tensor, box: Tensor, mask: Tensor | None = None, *, margin: float = MARGIN) -> Tensor:
    """Remove the object from an image by filling each box from its surroundings.

    The whole rectangle is filled, because an object's outline would reveal its class. The fill mirrors the four strips next to
    the box, weighted by distance, so that no hard seam reveals the box. "Noise or Signal" (Xiao et al. 2020, section 3) tiles
    the largest free strip instead (Only-BG-T), which shows where the box was.

    Args:
        pixels: uint8 `[H, W, 3]`.
        box: `[4]` or `[N, 4]`, the objects to remove, rounded outward.
        mask: bool `[H, W]` of a single object; the box is grown to contain it.
        margin: how far each box is grown, relative to its sides.

    Returns:
        uint8 `[H, W, 3]`, equal to `pixels` outside the grown boxes; inside, no value comes from any of them. If nothing is
        outside, the image is the constant ImageNet mean.

    Raises:
        L2R2Error: when no box covers a pixel, or the mask does not have the image's size.

    >>> image = torch.full((20, 20, 3), 90, dtype=torch.uint8)
    >>> image[5:10, 5:10] = 255
    >>> int(background_of(image, torch.tensor([5.0, 5.0, 10.0, 10.0])).max())
    90
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
    """Paste the object of one image onto a background, at its own place and size.

    Args:
        pixels: uint8 `[H, W, 3]`, the image with the object.
        box: `[4]`, the object's box.
        mask: bool `[H, W]`, the object's mask; without one, the whole box is pasted.
        background: uint8 `[h, w, 3]`; resized to cover `[H, W]`, then center-cropped.
        feather: see `object_alpha`.

    Returns:
        uint8 `[H, W, 3]`: exactly the background where `object_alpha` is 0, and exactly the object where it is 1.

    Raises:
        L2R2Error: when the box covers no pixel, or the mask does not have the image's size.
    """
    alpha = object_alpha(pixels.shape[:2], box, mask, feather)[..., None]
    mixed = alpha * pixels.float() + (1 - alpha) * cover(background, pixels.shape[:2]).float()
    return mixed.round().to(torch.uint8)


def object_alpha(size: tuple[int, ...], box: Tensor, mask: Tensor | None, feather: float | None = None) -> Tensor:
    """Compute the opacity of the object, `[H, W]` float32 in [0, 1].

    With a non-empty mask, it is 0 outside the mask, at least 0.5 inside (so that thin parts remain), and 1 away from the edge;
    the image's border is not an edge. Otherwise it is 1 in the box, so that a crop is unchanged, and falls to 0 outside.

    Args:
        size: `(H, W)`.
        box: see `paste_object`.
        mask: see `paste_object`.
        feather: width of the soft edge relative to the object's shorter side; 0 gives a hard edge. None is 0.08 outside a box,
            and 0.02 inside a mask.

    Returns:
        `[H, W]` float32.

    Raises:
        L2R2Error: when `feather` is outside [0, 0.5], the box covers no pixel, or the mask does not have the image's size.
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
    around = F.pad(mask[None, None].float(), (reach,) * 4, mode="replicate")  # the image's border is not an edge
    side = 2 * reach + 1
    filled = F.avg_pool2d(F.avg_pool2d(around, (side, 1), 1), (1, side), 1)[0, 0]  # about 0.5 at a straight edge, 1 inside
    return torch.where(filled > 1 - 1e-6, 1.0, filled.clamp(min=0.5)) * mask


def _box_alpha(size: tuple[int, int], window: tuple[int, int, int, int], feather: float) -> Tensor:
    x0, y0, x1, y1 = window
    x, y = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    outside = torch.maximum(torch.maximum(x0 - x, x - x1)[None], torch.maximum(y0 - y, y - y1)[:, None])  # negative in the box
    soft = feather * min(x1 - x0, y1 - y0)
    return (1 - outside / soft).clamp(0, 1) if soft > 0.5 else (outside < 0).float()


def cover(background: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize a background `[h, w, 3]` to cover `(H, W)`, then center-crop it: uint8 `[H, W, 3]`.

    >>> cover(torch.zeros(10, 40, 3, dtype=torch.uint8), (20, 20)).shape
    torch.Size([20, 20, 3])
    """
    height, width = size
    if background.shape[:2] == (height, width):
        return background
    scale = max(height / background.shape[0], width / background.shape[1])
    new = [max(want, round(scale * have)) for want, have in zip((height, width), background.shape[:2])]
    if new[0] * new[1] > MOST_COVERED * height * width:  # for a very long background, resize only the visible part
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
    """Return the integer windows of the objects in an image.

    Args:
        size: `(H, W)`.
        box: `[4]` or `[N, 4]`.
        mask: bool `[H, W]` of a single object; its window is grown to contain the mask.
        margin: how far each box is grown, relative to its sides.

    Returns:
        `(x0, y0, x1, y1)` of each box that covers a pixel.

    Raises:
        L2R2Error: when no box covers a pixel, or the mask does not have the image's size.
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
        raise L2R2Error(f"The object's box {boxes.tolist()} covers no pixel of its {size[1]}x{size[0]} image.")
    return [tuple(window) for window in windows[valid].tolist()]


def _check_mask(mask: Tensor, size: tuple[int, int]) -> None:
    if tuple(mask.shape) != size:
        raise L2R2Error(f"The mask is {mask.shape[1]}x{mask.shape[0]}, but its image is {size[1]}x{size[0]}.")


def _mirrored_in(pixels: Tensor, free: Tensor, window: tuple[int, int, int, int], rest: Tensor) -> Tensor:
    """Fill a window with its four adjacent strips, mirrored and weighted by 1 / distance^2; with `rest` if no strip is free."""
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
        # a strip narrower than the window repeats itself, so it gets less weight toward the middle
        weight = free[where] * min(1.0, room / int(along.max() + 1)) / (along + 1.0) ** 2
        sum_of_weights += weight
        total += weight[..., None] * pixels[where].float()
    blended = total / sum_of_weights.clamp(min=1e-12)[..., None]
    return torch.where(sum_of_weights[..., None] > 0, blended, rest).round().to(torch.uint8)

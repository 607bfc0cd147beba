"""`make_views` for one image without masks, in plain tensor operations that can be exported from PyTorch.

An antialiased resize is one matrix per axis; the crop, the padding and a kept or erased rectangle are zeros in it, so that no
shape depends on a box. The kernels are much faster; this is for runtimes without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from l2r2_kernels.roi_views.reference import filter_weights, integer_boxes
from torch import Tensor

from .spec import ViewSpec


def cut_in_graph(image: Tensor, boxes: Tensor, spec: ViewSpec, branches: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Cut the views of one image without data-dependent shapes or control flow.

    Args:
        image: `[H, W, 3]` uint8, upright RGB.
        boxes: `[V, 4]` xyxy in pixels of the image; a NaN row has no box.
        spec: how to cut; its mode must be `float`.
        branches: any of full, fg, bg.

    Returns:
        Normalized views by branch: full `[1, 3, S, S]`, fg and bg `[V, 3, S, S]`, which show the whole image in a row without a
        box; and `has_fg` `[V]` bool.
    """
    height, width = image.shape[0], image.shape[1]
    boxes = boxes.float()
    heights, widths = boxes.new_full((boxes.shape[0],), height), boxes.new_full((boxes.shape[0],), width)
    tight, has_fg = integer_boxes(boxes, heights, widths, 0.0)
    grown, _ = integer_boxes(boxes, heights, widths, spec.margin)
    whole = torch.stack([torch.zeros_like(heights), torch.zeros_like(heights), widths, heights], 1).long()
    tight, grown = (torch.where(has_fg[:, None], ends, whole) for ends in (tight, grown))
    fill = torch.tensor(spec.fill, dtype=torch.float32)
    pixels = (image.float() - fill).permute(2, 0, 1)  # [3, H, W]; 0 is the fill color
    views = {}
    if "full" in branches:
        views["full"] = _resized(pixels, whole[:1], whole[:1], spec, spec.size_of("full"))
    if "fg" in branches:
        window = grown if spec.fg.crops else whole
        views["fg"] = _resized(pixels, window, tight if spec.fg.erases else window, spec, spec.size_of("fg"))
    if "bg" in branches:
        size = spec.size_of("bg")
        erased = _resized(pixels, whole, tight, spec, size)
        views["bg"] = _resized(pixels, whole, whole, spec, size) - torch.where(has_fg[:, None, None, None], erased, 0.0)
    scale = 1 / (255 * torch.tensor(spec.std, dtype=torch.float32))[:, None, None]
    shift = (fill / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    return {branch: view * scale + shift[:, None, None] for branch, view in views.items()}, has_fg


def _resized(pixels: Tensor, window: Tensor, keep: Tensor, spec: ViewSpec, size: int) -> Tensor:
    """Resize each window's canvas of pixels `[3, H, W]` to `[V, 3, S, S]`, with fill outside `keep`."""
    x0, y0, x1, y1 = window.double().unbind(1)
    kx0, ky0, kx1, ky1 = keep.double().unbind(1)
    w, h = x1 - x0, y1 - y0
    side_x, side_y = (torch.maximum(w, h),) * 2 if spec.square else (w, h)
    taps = pixels.shape[1] + pixels.shape[2]  # an upper bound for the side of a canvas
    rows = _axis(y0, h, side_y, ky0, ky1, pixels.shape[1], taps, spec, size)  # [V, S, H]
    columns = _axis(x0, w, side_x, kx0, kx1, pixels.shape[2], taps, spec, size)  # [V, S, W]
    return rows[:, None] @ (pixels[None] @ columns[:, None].transpose(2, 3))  # [V, 3, H, S], then [V, 3, S, S]


def _axis(
    start: Tensor, length: Tensor, side: Tensor, keep0: Tensor, keep1: Tensor, pixels: int, taps: int, spec: ViewSpec, size: int
) -> Tensor:
    """Resize weights `[V, S, pixels]` of one axis, for a canvas of `side` taps that contains the window and its padding."""
    scale = side[:, None, None] / size
    center = (torch.arange(size, dtype=torch.float64)[None, :, None] + 0.5) * scale  # [V, S, 1]
    stretch = scale.clamp(min=1.0)

    def weights(tap: Tensor) -> Tensor:
        values: Tensor = filter_weights(spec.interpolation, (tap + 0.5 - center).abs() / stretch, a=-0.5)
        return values

    canvas = torch.arange(taps, dtype=torch.float64)[None, None]
    total = torch.where(canvas < side[:, None, None], weights(canvas), 0.0).sum(2, keepdim=True)
    pixel = torch.arange(pixels, dtype=torch.float64)[None, None]
    padding = torch.floor((side - length) / 2)
    inside = (pixel >= keep0[:, None, None]) & (pixel < keep1[:, None, None])
    of_pixel = weights(pixel + (padding - start)[:, None, None])
    return torch.where(inside, of_pixel / total, 0.0).float()

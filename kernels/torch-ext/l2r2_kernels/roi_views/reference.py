"""`roi_views` in plain PyTorch: the reference that every faster implementation is tested against.

Per view: margin, floor / ceil, clip to the image; crop; masked pixels become `fill`; pad to a centered square with
`fill`; resize; normalize. Both resizes are separable, so a view is `Wy @ crop @ Wx^T` with one weight matrix per axis.

`float` mode is `torch.nn.functional.interpolate` on the padded canvas. `pil` mode is Pillow's resize of that canvas, bit for
bit: horizontal pass first, rounded and clipped to uint8, then vertical, with coefficients rounded to 22 fractional bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Spec

# Boxes beyond this are clipped to the image anyway; the limit keeps `margin * side` finite in float32.
BOX_LIMIT = float(2**30)
PIL_BITS = 22


class Geometry(NamedTuple):
    """Integer placement of one view: crop [y0:y0+h, x0:x0+w] of the image at (pad_y, pad_x) of a canvas."""

    x0: int
    y0: int
    w: int
    h: int
    canvas_w: int
    canvas_h: int
    pad_x: int
    pad_y: int


def integer_boxes(boxes: Tensor, heights: Tensor, widths: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Boxes [V, 4] xyxy and the size of each view's image [V] -> (int64 [V, 4] after margin and clip, valid bool [V]).

    A box is valid if it is finite, its ends are in order and apart before any rounding, and it covers a pixel of the image.
    """
    boxes = boxes.detach().float()
    low, high = boxes.nan_to_num(0.0).clamp(-BOX_LIMIT, BOX_LIMIT).split(2, dim=1)
    grow = margin * (high - low)
    size = torch.stack([widths, heights], 1).to(boxes)
    ends = torch.cat([(low - grow).floor(), (high + grow).ceil()], 1).clamp(min=0)
    ints = torch.minimum(ends, torch.cat([size, size], 1)).long()
    return ints, boxes.isfinite().all(1) & (high > low).all(1) & (ints[:, 2:] > ints[:, :2]).all(1)


def geometry_of(box: Sequence[int], square: bool) -> Geometry:
    """Return the placement of the crop of one integer box on its canvas."""
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    if not square:
        return Geometry(x0, y0, w, h, w, h, 0, 0)
    side = max(w, h)
    return Geometry(x0, y0, w, h, side, side, (side - w) // 2, (side - h) // 2)


def as_chw(image: Tensor) -> Tensor:
    """[3, H, W] view of an image that is [3, H, W] or [H, W, 3]; CHW if ambiguous."""
    return image if image.shape[0] == 3 else image.permute(2, 0, 1)


def filter_weights(interpolation: str, t: Tensor, a: float) -> Tensor:
    """The resampling kernel at distance t >= 0 (in taps): triangle, or cubic convolution with parameter a."""
    if interpolation == "bilinear":
        return (1 - t).clamp(min=0)
    near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1
    far = (((t - 5) * t + 8) * t - 4) * a
    return torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def axis_weights(n_in: int, n_out: int, interpolation: str, antialias: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights [n_out, n_in] of one axis of `F.interpolate(align_corners=False)`; every row sums to 1."""
    center = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * (n_in / n_out)
    if antialias:
        taps = torch.arange(n_in, dtype=torch.float64)[None] + 0.5
        weights = filter_weights(interpolation, (taps - center).abs() / max(n_in / n_out, 1.0), a=-0.5)
        return (weights / weights.sum(1, keepdim=True)).to(dtype)
    source = center - 0.5
    if interpolation == "bilinear":
        source = source.clamp(min=0)
    first = source.floor()
    weights = torch.zeros(n_out, n_in, dtype=torch.float64)
    for k in range(-1, 3):  # taps beyond the border repeat the border pixel
        tap = first + k
        weights.scatter_add_(1, tap.clamp(0, n_in - 1).long(), filter_weights(interpolation, (tap - source).abs(), a=-0.75))
    return weights.to(dtype)


def pil_coefficients(n_in: int, n_out: int, interpolation: str) -> Tensor:
    """Pillow's integer coefficients [n_out, n_in] (int64, 22 fractional bits) of one axis."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    support = (1.0 if interpolation == "bilinear" else 2.0) * stretch
    center = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (center - support + 0.5).trunc().clamp(min=0)
    last = (center + support + 0.5).trunc().clamp(max=n_in)
    tap = torch.arange(n_in, dtype=torch.float64)[None]
    # Pillow multiplies by the reciprocal and adds the tap index first; the last bit can change how a coefficient is rounded.
    weights = filter_weights(interpolation, ((tap - center + 0.5) * (1.0 / stretch)).abs(), a=-0.5)
    weights = weights * ((tap >= first) & (tap < last))
    weights = weights / weights.cumsum(1)[:, -1:]  # cumsum adds in Pillow's order, sum does not
    return (weights * (1 << PIL_BITS) + torch.where(weights < 0, -0.5, 0.5)).trunc().long()


def _resize_float(crop: Tensor, mask: Tensor | None, g: Geometry, spec: Spec) -> Tensor:
    """Crop [3, h, w] (floating) -> canvas resized, minus fill: [3, height, width]. Padding and masked pixels weigh 0."""
    fill = torch.tensor(spec.fill, dtype=crop.dtype, device=crop.device)[:, None, None]
    x = crop - fill
    if mask is not None:
        x = torch.where(mask, x, torch.zeros_like(x))
    wy = axis_weights(g.canvas_h, spec.height, spec.interpolation, spec.antialias, crop.dtype).to(crop.device)
    wx = axis_weights(g.canvas_w, spec.width, spec.interpolation, spec.antialias, crop.dtype).to(crop.device)
    return wy[:, g.pad_y : g.pad_y + g.h] @ x @ wx[:, g.pad_x : g.pad_x + g.w].T


def _pil_pass(pixels: Tensor, coefficients: Tensor) -> Tensor:
    """One pass over the last axis: [..., n_in] -> [..., n_out], rounded and clipped. float64 holds every integer here."""
    total = (pixels @ coefficients.T.double()).long()
    return ((total + (1 << (PIL_BITS - 1))) >> PIL_BITS).clamp(0, 255).double()


def _resize_pil(crop: Tensor, mask: Tensor | None, g: Geometry, spec: Spec) -> Tensor:
    """Crop uint8 [3, h, w] -> Pillow's levels minus fill: float64 [3, size, size]."""
    fill = torch.tensor(spec.fill, dtype=torch.float64, device=crop.device)[:, None, None]
    x = crop.double()
    if mask is not None:
        x = torch.where(mask, x, fill)
    coefficients = pil_coefficients(g.canvas_w, spec.width, spec.interpolation).to(crop.device)
    canvas = fill.expand(3, g.h, g.canvas_w).clone()
    canvas[:, :, g.pad_x : g.pad_x + g.w] = x
    # Rows of pure fill stay fill: their coefficients sum to 2**22 within half a unit per tap, far from a rounding boundary.
    rows = fill.expand(3, g.canvas_h, spec.width).clone()
    rows[:, g.pad_y : g.pad_y + g.h] = _pil_pass(canvas, coefficients)
    return _pil_pass(rows.transpose(1, 2), coefficients).transpose(1, 2) - fill


def placements(
    sizes: Sequence[tuple[int, int]], boxes: Tensor, image_index: Tensor, spec: Spec
) -> tuple[list[int], list[Geometry | None], Tensor]:
    """(image of each view, placement or None where invalid, valid [V]) for images of the given (height, width)."""
    index = image_index.tolist()
    if index and not (min(index) >= 0 and max(index) < len(sizes)):
        raise ValueError(f"roi_views: image_index must lie in 0..{len(sizes) - 1}, got {min(index)}..{max(index)}")
    of_view = torch.tensor([sizes[i] for i in index], dtype=torch.int64, device=boxes.device).reshape(-1, 2)
    ints, valid = integer_boxes(boxes, of_view[:, 0], of_view[:, 1], spec.margin)
    placed = [geometry_of(b, spec.square) if ok else None for b, ok in zip(ints.tolist(), valid.tolist())]
    return index, placed, valid


def crop_mask(mask: Tensor | None, image: Tensor, g: Geometry) -> Tensor | None:
    """Return the part of a view's mask [H, W] inside its crop, as bool."""
    if mask is None:
        return None
    if mask.shape != image.shape[-2:]:
        raise ValueError(f"roi_views: masks must have their image's size {tuple(image.shape[-2:])}, got {tuple(mask.shape)}")
    return mask[g.y0 : g.y0 + g.h, g.x0 : g.x0 + g.w] != 0


def forward(
    images: Iterable[Tensor], boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor | None], spec: Spec,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Images as [3, H, W] or [H, W, 3] -> (views [V, 3, height, width] in spec.dtype, valid [V]), differentiable."""
    images = [as_chw(image) for image in images]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    index, placed, valid = placements(sizes, boxes, image_index, spec)
    device = images[0].device if images else boxes.device
    a, b = (torch.tensor(c, dtype=compute_dtype, device=device)[:, None, None] for c in spec.affine())
    views = []
    for v, (i, g) in enumerate(zip(index, placed)):
        if g is None:
            views.append(b.expand(3, spec.height, spec.width))
            continue
        crop = images[i][:, g.y0 : g.y0 + g.h, g.x0 : g.x0 + g.w]
        mask = crop_mask(masks[v], images[i], g)
        resized = _resize_pil(crop, mask, g, spec) if spec.mode == "pil" else _resize_float(crop.to(compute_dtype), mask, g, spec)
        views.append(a * resized + b)
    out = torch.stack(views) if views else torch.empty(0, 3, spec.height, spec.width, device=device)
    return out.to(spec.dtype).contiguous(memory_format=spec.memory_format), valid


def backward(
    grad: Tensor, shape: Sequence[int], boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor | None], spec: Spec,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """Gradient [B, 3, H, W] (compute_dtype) of a float batch of `shape`: `Wy^T (a * grad) Wx` summed over its views in order."""
    batch, _, height, width = shape
    index, placed, _ = placements([(height, width)] * batch, boxes, image_index, spec)
    a = torch.tensor(spec.affine()[0], dtype=compute_dtype, device=grad.device)[:, None, None]
    out = torch.zeros(tuple(shape), dtype=compute_dtype, device=grad.device)
    for v, (i, g) in enumerate(zip(index, placed)):
        if g is None:
            continue
        wy = axis_weights(g.canvas_h, spec.height, spec.interpolation, spec.antialias, compute_dtype).to(grad.device)
        wx = axis_weights(g.canvas_w, spec.width, spec.interpolation, spec.antialias, compute_dtype).to(grad.device)
        step = wy[:, g.pad_y : g.pad_y + g.h].T @ (a * grad[v].to(compute_dtype)) @ wx[:, g.pad_x : g.pad_x + g.w]
        mask = crop_mask(masks[v], out[i], g)
        out[i, :, g.y0 : g.y0 + g.h, g.x0 : g.x0 + g.w] += step if mask is None else torch.where(mask, step, 0.0)
    return out

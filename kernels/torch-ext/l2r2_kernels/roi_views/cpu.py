"""The CPU path: one crop at a time, resized in float32 (or by Pillow itself in `pil` mode), normalized as it is written.

A resize is two banded matrix products: a block of output rows needs a window of source rows, so each block is one
small dense product. That beats `F.interpolate` in float, and the padding needs no canvas.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .reference import Geometry, as_chw, axis_weights, crop_mask, filter_weights, placements
from .spec import Spec

# Outputs per product: fewer waste less of the window, more make larger products (measured).
BLOCK_Y, BLOCK_X = 8, 16
KEPT = 1 << 23  # floats of scratch kept per buffer and thread; larger images allocate


@lru_cache(maxsize=64)
def _bands(n_in: int, n_out: int, interpolation: str, antialias: bool, block: int) -> tuple[list[int], Tensor]:
    """Weights of one axis by blocks of outputs: (first input of each, float32 [blocks, block, window])."""
    ratio = n_in / n_out
    stretch = max(ratio, 1.0) if antialias else 1.0
    support = stretch * (1 if interpolation == "bilinear" else 2)
    outputs = torch.arange(-(-n_out // block) * block, dtype=torch.float64).clamp(max=n_out - 1).view(-1, block, 1)
    center = (outputs + 0.5) * ratio
    first = (center[:, :1] - support).floor().clamp(min=0)
    window = int((center[:, -1:] + support - first).max()) + 2
    taps = first + torch.arange(window, dtype=torch.float64)
    if antialias:
        weights = filter_weights(interpolation, (taps + 0.5 - center).abs() / stretch, a=-0.5)
    else:
        dense = axis_weights(n_in, n_out, interpolation, antialias=False)
        weights = dense[outputs.long(), taps.clamp(max=n_in - 1).long()]
    weights = weights * (taps < n_in)
    return first.flatten().int().tolist(), (weights / weights.sum(2, keepdim=True)).float()


@lru_cache(maxsize=64)
def _weight_inside(n_in: int, n_out: int, interpolation: str, antialias: bool, block: int, pad: int, extent: int) -> Tensor:
    """Return how much of each output's weight falls on [pad, pad + extent): float32 [n_out]."""
    starts, weights = _bands(n_in, n_out, interpolation, antialias, block)
    if pad == 0 and extent >= starts[-1] + weights.shape[2]:
        return torch.ones(n_out, dtype=torch.float32)
    taps = torch.tensor(starts)[:, None, None] + torch.arange(weights.shape[2])
    return (weights * ((taps >= pad) & (taps < pad + extent))).sum(2).flatten()[:n_out]


class _Scratch(threading.local):
    """Buffers kept between calls: allocating megabytes for every view costs more in page faults than the products."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if size > KEPT:
            return torch.empty(shape, dtype=torch.float32)
        if name not in self.buffers or self.buffers[name].numel() < size:
            with torch.inference_mode(False):  # a buffer made in inference mode cannot be written outside of it
                self.buffers[name] = torch.empty(size, dtype=torch.float32)
        return self.buffers[name][:size].view(shape)


_scratch = _Scratch()


def _vertical(bands: tuple[list[int], Tensor], x: Tensor, pad: int) -> Tensor:
    """Weights of the rows times x [extent, columns], which lies at `pad` on that axis -> scratch [outputs, columns]."""
    starts, weights = bands
    _, block, window = weights.shape
    out = _scratch.get("rows", len(starts) * block, x.shape[1])
    for k, start in enumerate(starts):
        lo, hi = max(start - pad, 0), min(start - pad + window, x.shape[0])
        part = out[k * block : (k + 1) * block]
        if lo < hi:
            torch.mm(weights[k, :, lo + pad - start : hi + pad - start], x[lo:hi], out=part)
        else:
            part.zero_()
    return out


def _horizontal(bands: tuple[list[int], Tensor], x: Tensor, pad: int) -> Tensor:
    """Rows ``x [rows, extent]`` times the weights of the columns -> scratch [rows, outputs]."""
    starts, weights = bands
    _, block, window = weights.shape
    out = _scratch.get("resized", x.shape[0], len(starts) * block)
    for k, start in enumerate(starts):
        lo, hi = max(start - pad, 0), min(start - pad + window, x.shape[1])
        part = out[:, k * block : (k + 1) * block]
        if lo < hi:
            torch.mm(x[:, lo:hi], weights[k, :, lo + pad - start : hi + pad - start].T, out=part)
        else:
            part.zero_()
    return out


def _float_pixels(crop: Tensor, mask: Tensor | None, fill: Tensor) -> tuple[Tensor, bool]:
    """Crop [3, h, w] -> (scratch float32 with masked pixels replaced, whether it is [h, w, 3]); [h, 3, w] otherwise."""
    _, h, w = crop.shape
    if crop.stride(0) == 1:
        x = _scratch.get("pixels", h, w, 3).copy_(crop.permute(1, 2, 0))
        color, keep = fill.view(3), None if mask is None else mask[:, :, None]
    else:
        x = _scratch.get("pixels", h, 3, w)
        for c in range(3):  # faster than one permuted copy
            x[:, c].copy_(crop[c])
        color, keep = fill.view(3, 1), None if mask is None else mask[:, None]
    if keep is not None:
        x.copy_(torch.where(keep, x, color))
    return x, crop.stride(0) == 1


def _resize_bands(
    crop: Tensor, mask: Tensor | None, g: Geometry, spec: Spec, fill: Tensor, a: Tensor, b: Tensor, out: Tensor
) -> None:
    """Write a * (resized canvas of a crop [3, h, w] - fill) + b to out [3, height, width]."""
    height, width = spec.height, spec.width
    of_y = (g.canvas_h, height, spec.interpolation, spec.antialias, BLOCK_Y)
    of_x = (g.canvas_w, width, spec.interpolation, spec.antialias, BLOCK_X)
    by, bx = _bands(*of_y), _bands(*of_x)
    x, interleaved = _float_pixels(crop, mask, fill)
    rows = _vertical(by, x.view(g.h, 3 * g.w), g.pad_y)[:height]
    if interleaved:  # fewer pixels to reorder now, to [3, height, w]
        rows = _scratch.get("planar", 3, height, g.w).copy_(rows.view(height, g.w, 3).permute(2, 0, 1))
    resized = _horizontal(bx, rows.view(height * 3, g.w), g.pad_x)[:, :width]
    resized = resized.view(3, height, width) if interleaved else resized.view(height, 3, width).transpose(0, 1)
    if (g.w, g.h) == (g.canvas_w, g.canvas_h):
        torch.addcmul(b - a * fill, resized, a, out=out)
    else:  # the padding is fill, so only the share of the crop is subtracted
        inside = _weight_inside(*of_y, g.pad_y, g.h)[:, None] * _weight_inside(*of_x, g.pad_x, g.w)
        torch.addcmul(resized, inside, fill, value=-1, out=out)
        torch.addcmul(b, out, a, out=out)


def _resize_pil(crop: Tensor, mask: Tensor | None, g: Geometry, spec: Spec) -> Tensor:
    """Crop uint8 [3, h, w] -> Pillow's levels of the padded canvas: uint8 [3, size, size]."""
    import numpy as np
    from PIL import Image

    fill = tuple(int(f) for f in spec.fill)
    pixels = crop.permute(1, 2, 0)
    if mask is not None:
        pixels = torch.where(mask[:, :, None], pixels, torch.tensor(fill, dtype=torch.uint8))
    canvas = Image.fromarray(pixels.contiguous().numpy())
    if canvas.size != (g.canvas_w, g.canvas_h):
        padded = Image.new("RGB", (g.canvas_w, g.canvas_h), fill)
        padded.paste(canvas, (g.pad_x, g.pad_y))
        canvas = padded
    how = Image.Resampling.BILINEAR if spec.interpolation == "bilinear" else Image.Resampling.BICUBIC
    return torch.from_numpy(np.array(canvas.resize((spec.width, spec.height), how))).permute(2, 0, 1)


def _color(channels: Sequence[float]) -> Tensor:
    return torch.tensor(channels, dtype=torch.float32)[:, None, None]


def forward(
    images: Iterable[Tensor], boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor | None], spec: Spec
) -> tuple[Tensor, Tensor]:
    """Images as [3, H, W] or [H, W, 3] on the CPU -> (views [V, 3, height, width] in spec.dtype, valid [V])."""
    images = [as_chw(image) for image in images]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    index, placed, valid = placements(sizes, boxes, image_index, spec)
    fill, a, b = map(_color, (spec.fill, *spec.affine()))
    views = torch.empty(len(index), 3, spec.height, spec.width, dtype=torch.float32)
    for v, (i, g) in enumerate(zip(index, placed)):
        if g is None:
            views[v] = b
            continue
        crop = images[i][:, g.y0 : g.y0 + g.h, g.x0 : g.x0 + g.w]
        mask = crop_mask(masks[v], images[i], g)
        if spec.mode == "pil":
            torch.addcmul(b - a * fill, _resize_pil(crop, mask, g, spec), a, out=views[v])
        else:
            _resize_bands(crop, mask, g, spec, fill, a, b, views[v])
    return views.to(spec.dtype, memory_format=spec.memory_format), valid

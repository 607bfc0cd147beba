"""The CPU path: one crop at a time, resized in float32 (or by Pillow itself in `pil` mode), normalised once a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Geometry, as_chw, crop_mask, placements
from .spec import Spec


def _resize_float(crop: Tensor, mask: Tensor | None, g: Geometry, spec: Spec, fill: Tensor) -> Tensor:
    """Crop [3, h, w] -> canvas resized, minus fill: float32 [3, height, width]."""
    x = crop.float() - fill
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    pad_right, pad_bottom = g.canvas_w - g.w - g.pad_x, g.canvas_h - g.h - g.pad_y
    x = F.pad(x, (g.pad_x, pad_right, g.pad_y, pad_bottom))
    return F.interpolate(x[None], size=(spec.height, spec.width), mode=spec.interpolation, antialias=spec.antialias)[0]


def _resize_pil(crop: Tensor, mask: Tensor | None, g: Geometry, spec: Spec) -> Tensor:
    """Crop uint8 [3, h, w] -> Pillow's levels of the padded canvas: uint8 [3, size, size]."""
    import numpy as np
    from PIL import Image

    canvas = np.empty((g.canvas_h, g.canvas_w, 3), dtype=np.uint8)
    canvas[:] = [int(f) for f in spec.fill]
    inside = canvas[g.pad_y : g.pad_y + g.h, g.pad_x : g.pad_x + g.w]
    pixels = crop.permute(1, 2, 0).numpy()
    np.copyto(inside, pixels, where=True if mask is None else mask.numpy()[:, :, None])
    how = Image.Resampling.BILINEAR if spec.interpolation == "bilinear" else Image.Resampling.BICUBIC
    resized = Image.fromarray(canvas).resize((spec.width, spec.height), how)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def forward(
    images: Sequence[Tensor], boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor | None], spec: Spec
) -> tuple[Tensor, Tensor]:
    """Images as [3, H, W] or [H, W, 3] on the CPU -> (views [V, 3, height, width] in spec.dtype, valid [V])."""
    images = [as_chw(image) for image in images]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    index, placed, valid = placements(sizes, boxes, image_index, spec)
    fill = torch.tensor(spec.fill)[:, None, None]
    levels = torch.zeros(len(index), 3, spec.height, spec.width)  # minus fill: what no view writes is fill
    for v, (i, g) in enumerate(zip(index, placed)):
        if g is None:
            continue
        crop = images[i][:, g.y0 : g.y0 + g.h, g.x0 : g.x0 + g.w]
        mask = crop_mask(masks[v], images[i], g)
        if spec.mode == "pil":
            torch.sub(_resize_pil(crop, mask, g, spec), fill, out=levels[v])
        else:
            levels[v] = _resize_float(crop, mask, g, spec, fill)
    a, b = (torch.tensor(c)[:, None, None] for c in spec.affine())
    return levels.mul_(a).add_(b).to(spec.dtype, memory_format=spec.memory_format), valid

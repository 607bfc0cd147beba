"""Launches the Triton kernels: pointer tables, buffers, and a fixed table of tile shapes. Nothing here waits for the GPU."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import on_device
from . import triton_backward, triton_forward, triton_pil, triton_weights
from .spec import Spec

PREPARE = {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": False}  # the reference's roundings, so no fused multiply-add
# Fixed launch tables, chosen by counting wasted taps and registers (no spills on sm_90; tests compile every entry).
HALF = {"BLOCK_H": 32, "BLOCK_W": 16, "CHUNK_Y": 32}
FULL = {"BLOCK_H": 16, "BLOCK_W": 16, "CHUNK_Y": 16}
PIL = {"BLOCK_H": 64, "BLOCK_W": 16, "CHUNK_Y": 32, "CHUNK_X": 32}
BACKWARD = {"BLOCK_Y": 16, "BLOCK_X": 32, "CHUNK_I": 16, "CHUNK_J": 16}


def forward_config(small: bool, dtype: torch.dtype, kind: int, masked: bool, ratio: float) -> dict[str, Any]:
    """Launch options of the float kernel: `small` if levels fit float16, `ratio` the most source pixels a column of the output.

    uint8 levels are exact in float16, and its weights cost 0.3 of a level at most. A float32 output needs more bits, and float
    images may leave float16's range: both take three tf32 dots (a single one truncates its operands and so darkens).
    bfloat16 is never used for weights: it costs more than a level.
    """
    half = small and dtype != torch.float32
    support = (1 + kind % 2) * (max(ratio, 1.0) if kind <= 1 else 1.0)
    window = math.ceil(16 * ratio + 2 * support) + 4
    # A window that fits one chunk keeps its weights in registers; operands of 32 bits leave no room for that.
    one_x = half and window <= 64
    return {
        **(HALF if half else FULL),
        "DOT": tl.float16 if half else tl.float32,
        "ONE_X": one_x,
        "CHUNK_X": (64 if one_x and window > 32 else 32) if half else 16,
        "num_warps": (4 if masked or kind == 3 else 2) if half else (8 if masked and kind == 3 else 2),
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def pil_config(masked: bool) -> dict[str, Any]:
    """Launch options of the pil kernel."""
    return {**PIL, "num_warps": 8 if masked else 4, "num_stages": 2, "enable_fp_fusion": True}


def backward_config(kind: int, masked: bool) -> dict[str, Any]:
    """Launch options of the backward kernel."""
    return {
        **BACKWARD,
        "num_warps": 8 if masked or kind == 3 else 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return type(triton_forward.forward).__name__ == "InterpretedFunction"


def _table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """An int64 table on the device, copied through pinned memory so that the host does not wait."""
    flat = array("q", chain.from_iterable(rows))  # several times as fast as torch.tensor(rows)
    table = torch.frombuffer(flat, dtype=torch.int64).view(len(rows), -1)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


class _Source:
    """Where the kernels find the pixels: one batch by strides, or a table of pointers, sizes and strides."""

    def __init__(self, images: Tensor | Sequence[Tensor], device: torch.device) -> None:
        self.ragged = not isinstance(images, Tensor)
        self.count = len(images)
        self.height = self.width = 0
        self.strides: tuple[int, ...] = (0, 0, 0, 0)
        if isinstance(images, Tensor):
            self.pixels = images
            self.height, self.width = images.shape[2:]
            self.strides = images.stride()
            self.packed = self.strides[1] == 1 and self.strides[3] == 3
            self.step = max(self.strides[2:])
            self.table = torch.empty(0, dtype=torch.int64, device=device)
            self.max_height, self.max_width = self.height, self.width
            return
        rows = []
        for image in images:
            shape, step = image.shape, image.stride()
            y, x, c = (1, 2, 0) if shape[0] == 3 else (0, 1, 2)
            rows.append((image.data_ptr(), shape[y], shape[x], step[c], step[y], step[x]))
        self.packed = all(row[3] == 1 and row[5] == 3 for row in rows)
        self.step = max(max(row[4:]) for row in rows)
        self.table = _table(rows, device)
        self.pixels = images[0]
        self.max_height = max(row[1] for row in rows)
        self.max_width = max(row[2] for row in rows)

    def canvas(self, square: bool) -> tuple[int, int]:
        """The largest (height, width) a canvas can have."""
        side = max(self.max_height, self.max_width)
        return (side, side) if square else (self.max_height, self.max_width)


def _mask_table(masks: Sequence[Tensor], mask_views: Sequence[int], views: int, device: torch.device) -> Tensor:
    if not masks:
        return torch.empty(0, dtype=torch.int64, device=device)
    rows = [(0, 0, 0, 0, 0)] * views
    for view, mask in zip(mask_views[1:], masks):
        rows[view] = (mask.data_ptr(), *mask.shape, *mask.stride())
    return _table(rows, device)


def _check(device: torch.device, spec: Spec, source: _Source) -> None:
    if device.type != "cuda" and not interpreted():
        raise ValueError('roi_views: backend "triton" needs CUDA images (or TRITON_INTERPRET=1 for a test on the CPU)')
    # The kernels count distances, and steps inside a chunk of pixels, in 32 bits.
    side = max(source.canvas(True))
    if max(4 * (max(spec.height, spec.width) + 64) * (side + 256), 128 * source.step) >= 2**31:
        raise ValueError(f"roi_views: images with a side of {side} pixels and size {spec.height, spec.width} are too large")


def _prepare(source: _Source, boxes: Tensor, index: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the placement of every view: (geometry int32 [V, 8], norm float32 [V, height + width], valid bool [V])."""
    views, device = boxes.shape[0], boxes.device
    geometry = torch.empty(views, triton_weights.GEOMETRY, dtype=torch.int32, device=device)
    norm = torch.empty(views, spec.height + spec.width, dtype=torch.float32, device=device)
    valid = torch.empty(views, dtype=torch.bool, device=device)
    triton_weights.prepare[(views,)](
        boxes, index, source.table, source.count, source.height, source.width, spec.margin, geometry,
        valid.view(torch.uint8), norm, OUT_H=spec.height, OUT_W=spec.width,
        KIND=triton_weights.KINDS[spec.interpolation, spec.antialias], RAGGED=source.ragged, SQUARE=spec.square,
        **PREPARE,
    )  # fmt: skip
    return geometry, norm, valid


def forward(
    images: Tensor | Sequence[Tensor],
    boxes: Tensor,
    index: Tensor,
    masks: Sequence[Tensor],
    mask_views: Sequence[int],
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.forward; masks are those there are, mask_views is [-1, view of each]."""
    views, device = boxes.shape[0], boxes.device
    shape = (views, 3, spec.height, spec.width)
    out = torch.empty(shape, dtype=spec.dtype, device=device, memory_format=spec.memory_format)
    if not views or not len(images):
        valid = torch.zeros(views, dtype=torch.bool, device=device)
        return _fill_only(out, spec), valid
    source = _Source(images, device)
    _check(device, spec, source)
    mask_table = _mask_table(masks, mask_views, views, device)
    boxes, index = boxes.contiguous(), index.contiguous()
    run = _launch_pil if spec.mode == "pil" else _launch_float
    with on_device(device):
        return out, run(out, source, boxes, index, mask_table, spec)


def _fill_only(out: Tensor, spec: Spec) -> Tensor:
    return out.copy_(torch.tensor(spec.affine()[1], device=out.device)[:, None, None].expand(out.shape))


def _launch_float(out: Tensor, source: _Source, boxes: Tensor, index: Tensor, mask_table: Tensor, spec: Spec) -> Tensor:
    geometry, norm, valid = _prepare(source, boxes, index, spec)
    kind, masked = triton_weights.KINDS[spec.interpolation, spec.antialias], mask_table.numel() > 0
    ratio = source.canvas(spec.square)[1] / spec.width
    small = source.pixels.dtype == torch.uint8 and max(map(abs, spec.fill)) <= 1024
    config = forward_config(small, spec.dtype, kind, masked, ratio)
    tiles = triton.cdiv(spec.height, config["BLOCK_H"]) * triton.cdiv(spec.width, config["BLOCK_W"])
    a, b = spec.affine()
    triton_forward.forward[(boxes.shape[0] * tiles,)](
        out, source.pixels, source.table, mask_table, index, geometry, norm, *source.strides, *out.stride(), *spec.fill, *a, *b,
        OUT_H=spec.height, OUT_W=spec.width, KIND=kind, RAGGED=source.ragged, PACKED=source.packed, MASKED=masked, **config,
    )  # fmt: skip
    return valid


def _launch_pil(out: Tensor, source: _Source, boxes: Tensor, index: Tensor, mask_table: Tensor, spec: Spec) -> Tensor:
    views, device, size = boxes.shape[0], boxes.device, spec.height
    kind = triton_weights.KINDS[spec.interpolation, True]
    needed = math.ceil((1 + kind) * max(source.canvas(True)[0] / size, 1.0)) * 2 + 1
    taps = triton.next_power_of_2(needed)  # rounded up: a new largest image rarely means a new compilation
    geometry = torch.empty(views, triton_weights.GEOMETRY, dtype=torch.int32, device=device)
    valid = torch.empty(views, dtype=torch.bool, device=device)
    coefficients = torch.empty(views, size, taps, dtype=torch.int32, device=device)
    first = torch.empty(views, size, dtype=torch.int32, device=device)
    sums = torch.empty(views, size, dtype=torch.int32, device=device)
    triton_pil.pil_prepare[(views,)](
        boxes, index, source.table, source.count, source.height, source.width, spec.margin, geometry,
        valid.view(torch.uint8), coefficients, first, sums, OUT=size, KIND=kind, TAPS=taps, RAGGED=source.ragged,
        **PREPARE,
    )  # fmt: skip
    masked = mask_table.numel() > 0
    a, b = spec.affine()
    tiles = triton.cdiv(size, PIL["BLOCK_H"]) * triton.cdiv(size, PIL["BLOCK_W"])
    triton_pil.pil_forward[(views * tiles,)](
        out, source.pixels, source.table, mask_table, index, geometry, coefficients, first, sums,
        *source.strides, *out.stride(), *(int(f) for f in spec.fill), *a, *b,
        OUT=size, KIND=kind, TAPS=taps, RAGGED=source.ragged, PACKED=source.packed, MASKED=masked, **pil_config(masked),
    )  # fmt: skip
    return valid


def backward(
    grad: Tensor, images: Tensor, boxes: Tensor, index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], spec: Spec
) -> Tensor:
    """Gradient of a float batch [B, 3, H, W], contiguous, in its dtype."""
    device = images.device
    batch, _, height, width = images.shape
    if not boxes.shape[0] or not images.numel():
        return torch.zeros(images.shape, dtype=images.dtype, device=device)
    grad_in = torch.empty(images.shape, dtype=images.dtype, device=device)
    source = _Source(images, device)
    _check(device, spec, source)
    mask_table = _mask_table(masks, mask_views, boxes.shape[0], device)
    boxes, index = boxes.contiguous(), index.contiguous()
    # A stable order of the views by image: each image adds its views in the order they were given.
    of_image, order = index.sort(stable=True)
    starts = torch.searchsorted(of_image, torch.arange(batch + 1, device=device))
    tiles = triton.cdiv(height, BACKWARD["BLOCK_Y"]) * triton.cdiv(width, BACKWARD["BLOCK_X"])
    kind, masked = triton_weights.KINDS[spec.interpolation, spec.antialias], mask_table.numel() > 0
    with on_device(device):
        geometry, norm, _ = _prepare(source, boxes, index, spec)
        triton_backward.backward[(batch * tiles,)](
            grad, grad_in, mask_table, order, starts, geometry, norm, height, width, *grad.stride(), *spec.affine()[0],
            OUT_H=spec.height, OUT_W=spec.width, KIND=kind, MASKED=masked, **backward_config(kind, masked),
        )  # fmt: skip
    return grad_in

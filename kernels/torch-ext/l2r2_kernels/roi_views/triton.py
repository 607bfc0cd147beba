"""Launch the Triton kernels, with buffers and a fixed table of tile shapes, without synchronization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import on_device
from . import triton_backward, triton_forward, triton_pil, triton_place, triton_uint8, triton_weights
from .source import Source, from_batch, mask_table
from .spec import Spec

PREPARE = {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": False}  # no fused multiply-add: rounds as the reference does
# Fixed launch tables (tests compile every entry for sm_90: no spills with Triton 3.6, 3.8 and 3.9). Those of packed uint8 images
# and of the backward were the fastest of a sweep on an H100; the others were chosen by counting wasted taps and registers.
GENERAL_HALF = {"BLOCK_H": 32, "BLOCK_W": 16, "CHUNK_Y": 16, "ONE_X": False, "CHUNK_X": 32}
GENERAL_FULL = {"BLOCK_H": 16, "BLOCK_W": 16, "CHUNK_Y": 16, "ONE_X": False, "CHUNK_X": 16}
PIL = {"BLOCK_W": 32, "BLOCK_H": 32, "CHUNK_Y": 32, "T1": 4, "LOOP": 6}
BACKWARD = {"BLOCK_Y": 16, "BLOCK_X": 16, "CHUNK_I": 16, "CHUNK_J": 16}
ELEMENTS = {
    torch.uint8: tl.uint8, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
    torch.float64: tl.float64,
}  # fmt: skip


def fits_half(spec: Spec, ratio: float) -> bool:
    """Return whether float16 can represent a column's sum of uint8 levels minus fill, precisely enough for the output.

    The error of float16 weights is at most 0.3 of a level. A float32 output needs more bits: it takes three tf32 dots (a single
    one truncates its operands, which darkens the result). bfloat16 weights are never used; their error exceeds one level.
    """
    return spec.dtype != torch.float32 and (255 + max(map(abs, spec.fill))) * 1.3 * max(ratio, 1.0) < 65504


def uint8_config(half: bool, kind: int, masked: bool, mixed: bool, ratio: float, pixel: int) -> dict[str, Any]:
    """Launch options of the uint8 kernel for images of one layout.

    half: see `fits_half`. mixed: whether the batch has images of the other layout too. ratio: the most source pixels per column
    of the output. pixel: 3 for packed images, 1 for planes.

    Views with few taps use one window of that many. Wider views of a batch use a third window if none needs more, else a loop.
    """
    looped = kind == 1 or ratio > 3.5
    options: dict[str, Any] = {"T1": 5, "T2": 11, "T3": 5} if kind else {"T1": 3, "T2": 5, "T3": 3 if looped else 7}
    options |= {"BLOCK_W": 32, "BLOCK_H": 32 if half else 16, "CHUNK_Y": 16}
    options |= {"num_warps": 4 if masked else 2, "num_stages": 1, "enable_fp_fusion": True}
    if masked or (kind and pixel == 1):
        options["maxnreg"] = 224  # by default, the assembler rounds down to 168 and spills
    elif pixel == 1 or ratio > 12:
        options["maxnreg"] = 168  # or down to 128, in some versions
    if half and ratio > 12:
        options |= {"BLOCK_H": 16, "CHUNK_Y": 32, "num_warps": 8 if masked else 4}
    elif half and pixel == 3 and not (kind or masked or mixed):
        options["maxnreg"] = 128  # twice the warps per multiprocessor, still without spills
    return {**options, "LOOPED": looped, "MIXED": mixed, "DOT": tl.float16 if half else tl.float32, "BIASED": half}


def general_config(dtype: torch.dtype, kind: int, masked: bool, half: bool) -> dict[str, Any]:
    """Launch options of the general kernel, for images of `dtype`. Only uint8 levels are exact in float16."""
    half = half and dtype == torch.uint8
    return {
        **(GENERAL_HALF if half else GENERAL_FULL),
        "ELEMENT": ELEMENTS[dtype],
        "DOT": tl.float16 if half else tl.float32,
        "num_warps": (4 if masked or kind == 3 else 2) if half else (8 if masked and kind == 3 else 2),
        "num_stages": 2,
        "maxnreg": 255,  # by default, some versions round down to 128 or 168 and spill
        "enable_fp_fusion": True,
    }


def pil_config(masked: bool, mixed: bool, pixel: int) -> dict[str, Any]:
    """Launch options of the pil kernel for images of one layout; see `uint8_config`."""
    warps = 8 if masked or mixed or pixel == 1 else 4
    return {**PIL, "MIXED": mixed, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def backward_config(kind: int, masked: bool) -> dict[str, Any]:
    """Launch options of the backward kernel."""
    return {**BACKWARD, "num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    return type(triton_forward.forward).__name__ == "InterpretedFunction"


def _check(source: Source, device: torch.device, spec: Spec) -> None:
    if device.type != "cuda" and not interpreted():
        raise ValueError('roi_views: backend "triton" needs CUDA images (or TRITON_INTERPRET=1 for a test on the CPU)')
    # The kernels count distances, and steps inside a chunk of pixels and inside a view, in 32 bits.
    side = max(source.canvas(True))
    distances = 4 * (max(spec.height, spec.width) + 64) * (side + 256)
    if max(distances, source.span, 3 * (spec.height + 64) * (spec.width + 64)) >= 2**31:
        raise ValueError(f"roi_views: images with a side of {side} pixels and size {spec.height, spec.width} are too large")


class _Call:
    """The buffers and arguments that the kernels of one call share."""

    def __init__(self, source: Source, boxes: Tensor, index: Tensor, masks: Tensor, spec: Spec) -> None:
        views, device = boxes.shape[0], boxes.device
        self.source, self.spec, self.masks, self.views = source, spec, masks, views
        self.kind = triton_weights.KINDS[spec.interpolation, spec.antialias]
        self.record = torch.empty(views, triton_place.RECORD.value, dtype=torch.int64, device=device)
        self.valid = torch.empty(views, dtype=torch.bool, device=device)
        self.placed = (
            boxes.contiguous(), index.contiguous(), source.pixels, source.table, source.images, *source.size, *source.strides,
            spec.margin, self.record, self.valid.view(torch.uint8),
        )  # fmt: skip
        self.asm = boxes.is_cuda

    def tiles(self, config: dict[str, Any]) -> tuple[int]:
        return (self.views * triton.cdiv(self.spec.height, config["BLOCK_H"]) * triton.cdiv(self.spec.width, config["BLOCK_W"]),)

    def prepare(self) -> Tensor:
        """Write the records and valid, and return the norms [V, height + width]."""
        spec, device = self.spec, self.record.device
        norm = torch.empty(self.views, spec.height + spec.width, dtype=torch.float32, device=device)
        triton_place.prepare[(self.views,)](
            *self.placed, norm, OUT_H=spec.height, OUT_W=spec.width, KIND=self.kind, RAGGED=self.source.ragged,
            SQUARE=spec.square, **PREPARE,
        )  # fmt: skip
        return norm

    def launch_float(self, out: Tensor) -> None:
        spec, source, masked = self.spec, self.source, self.masks.numel() > 0
        norm = self.prepare()
        a, b = spec.affine()
        arguments = (out, self.record, self.masks, norm, *out.stride(), *spec.fill, *a, *b)
        constants = {"OUT_H": spec.height, "OUT_W": spec.width, "KIND": self.kind, "MASKED": masked}
        ratio = source.canvas(spec.square)[1] / spec.width
        half = fits_half(spec, ratio)
        if source.pixels.dtype != torch.uint8 or not spec.antialias:
            config = general_config(source.pixels.dtype, self.kind, masked, half)
            triton_forward.forward[self.tiles(config)](*arguments, **constants, **config)
            return
        for pixel in source.layouts:
            config = uint8_config(half, self.kind, masked, len(source.layouts) > 1, ratio, pixel)
            triton_uint8.forward_uint8[self.tiles(config)](*arguments, **constants, PIXEL=pixel, ASM=self.asm, **config)

    def launch_pil(self, out: Tensor) -> None:
        spec, source, size, device = self.spec, self.source, self.spec.height, out.device
        needed = math.ceil((1 + self.kind) * max(source.canvas(True)[0] / size, 1.0)) * 2 + 1
        taps = triton.next_power_of_2(needed)  # rounded up, so that a new largest image rarely causes a recompilation
        coefficients = torch.empty(self.views, size, taps, dtype=torch.int32, device=device)
        first = torch.empty(self.views, size, dtype=torch.int32, device=device)
        sums = torch.empty(self.views, size, dtype=torch.int32, device=device)
        triton_pil.pil_prepare[(self.views,)](
            *self.placed, coefficients, first, sums, OUT=size, KIND=self.kind, TAPS=taps, RAGGED=source.ragged, **PREPARE
        )
        masked = self.masks.numel() > 0
        a, b = spec.affine()
        for pixel in source.layouts:
            config = pil_config(masked, len(source.layouts) > 1, pixel)
            triton_pil.pil_forward[self.tiles(config)](
                out, self.record, self.masks, coefficients, first, sums, *out.stride(), *(int(f) for f in spec.fill), *a, *b,
                OUT=size, KIND=self.kind, TAPS=taps, PIXEL=pixel, MASKED=masked, ASM=self.asm, **config,
            )  # fmt: skip


def forward(
    source: Source | None, boxes: Tensor, index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], spec: Spec
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.forward; source None: no image; masks: the given ones; mask_views: [-1, view of each]."""
    views, device = boxes.shape[0], boxes.device
    shape = (views, 3, spec.height, spec.width)
    out = torch.empty(shape, dtype=spec.dtype, device=device, memory_format=spec.memory_format)
    if not views or source is None or not source.images:
        out.copy_(torch.tensor(spec.affine()[1], device=device)[:, None, None].expand(shape))
        return out, torch.zeros(views, dtype=torch.bool, device=device)
    _check(source, device, spec)
    table, rows = mask_table(masks, mask_views, views, device)
    with on_device(device):
        call = _Call(source, boxes, index, table, spec)
        call.launch_pil(out) if spec.mode == "pil" else call.launch_float(out)
    del rows  # copies that had to stay alive until here
    return out, call.valid


def backward(
    grad: Tensor, images: Tensor, boxes: Tensor, index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], spec: Spec
) -> Tensor:
    """Gradient of a float batch [B, 3, H, W], contiguous, in its dtype."""
    device = images.device
    batch, _, height, width = images.shape
    if not boxes.shape[0] or not images.numel():
        return torch.zeros(images.shape, dtype=images.dtype, device=device)
    grad_in = torch.empty(images.shape, dtype=images.dtype, device=device)
    source = from_batch(images)
    _check(source, device, spec)
    table, rows = mask_table(masks, mask_views, boxes.shape[0], device)
    # A stable order of the views by image: each image adds its views in the order they were given.
    of_image, order = index.sort(stable=True)
    starts = torch.searchsorted(of_image, torch.arange(batch + 1, device=device))
    tiles = triton.cdiv(height, BACKWARD["BLOCK_Y"]) * triton.cdiv(width, BACKWARD["BLOCK_X"])
    with on_device(device):
        call = _Call(source, boxes, index, table, spec)
        masked = table.numel() > 0
        triton_backward.backward[(batch * tiles,)](
            grad, grad_in, table, order, starts, call.record, call.prepare(), height, width, *grad.stride(), *spec.affine()[0],
            OUT_H=spec.height, OUT_W=spec.width, KIND=call.kind, MASKED=masked, **backward_config(call.kind, masked),
        )  # fmt: skip
    del rows
    return grad_in

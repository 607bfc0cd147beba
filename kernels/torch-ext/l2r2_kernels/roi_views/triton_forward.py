"""General forward kernel of `float` mode (float images, no antialias): both passes of the resize on tensor cores.

One program computes a tile of one view. uint8 images with antialias have a faster kernel: triton_uint8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_place import load_place, load_steps
from .triton_uint8 import store_tile
from .triton_weights import crop_range, weight
from .triton_words import mask_place


@triton.jit
def kept(mask_table, v, y, x, rows, cols):
    """Whether the mask of view v keeps the pixels (y + rows, x + cols); all are kept without a mask."""
    start, step, height, width = mask_place(mask_table, v, y, x)  # what is left of the mask from (y, x) on
    inside = (rows < height)[:, None] & (cols < width)[None, :]
    offset = rows[:, None] * step.to(tl.int32) + cols[None, :]
    return tl.load(start.to(tl.pointer_type(tl.uint8)) + offset, mask=inside, other=1) != 0


@triton.jit
def axis_weights(outputs, taps, n_in, N_OUT: tl.constexpr, norm, KIND: tl.constexpr):
    """Weights of the broadcast shape; outputs beyond N_OUT get 0."""
    w = weight(outputs, taps, n_in, N_OUT, KIND)
    if KIND <= 1:
        w *= tl.load(norm + outputs, mask=outputs < N_OUT, other=0.0)
    return w


@triton.jit
def chunk_pointers(pointer, y, x, rows, cols, stride_y, stride_x):
    """Pointers to the crop's pixels [rows, cols] from (y, x) on; offsets in a chunk fit 32 bits, which halves their registers."""
    start = pointer + tl.cast(y, tl.int64) * stride_y + tl.cast(x, tl.int64) * stride_x
    return start + (rows[:, None] * tl.cast(stride_y, tl.int32) + cols[None, :] * tl.cast(stride_x, tl.int32))


@triton.jit
def pixels(pointers, inside, fill, DOT: tl.constexpr):
    """Source pixels minus fill; 0, which is fill, outside the crop and the mask."""
    p = tl.load(pointers, mask=inside, other=0).to(tl.float32)
    return tl.where(inside, p - fill, 0.0).to(DOT)


@triton.jit
def row_pass(h0, h1, h2, wx, pointers, stride_c, inside, fill0, fill1, fill2, DOT: tl.constexpr):
    """Add one chunk of source pixels, times the horizontal weights, to the three channels' [CHUNK_Y, BLOCK_W]."""
    h0 = tl.dot(pixels(pointers, inside, fill0, DOT), wx, h0, input_precision="tf32x3")
    h1 = tl.dot(pixels(pointers + stride_c, inside, fill1, DOT), wx, h1, input_precision="tf32x3")
    h2 = tl.dot(pixels(pointers + 2 * stride_c, inside, fill2, DOT), wx, h2, input_precision="tf32x3")
    return h0, h1, h2


@triton.jit
def in_window(mask_table, v, y0, x0, y, x, iy, ix, y_hi, x_hi, MASKED: tl.constexpr):
    """Which crop pixels (y + iy, x + ix) a tile needs and its view's mask keeps."""
    inside = (y + iy < y_hi)[:, None] & (x + ix < x_hi)[None, :]
    if MASKED:
        inside = inside & kept(mask_table, v, y0 + y, x0 + x, iy, ix)
    return inside


@triton.jit
def forward(
    out, record, mask_table, norm, out_v, out_c, out_y, out_x, fill0, fill1, fill2, a0, a1, a2, b0, b1, b2,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, KIND: tl.constexpr, ELEMENT: tl.constexpr, MASKED: tl.constexpr,
    DOT: tl.constexpr, ONE_X: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK_Y: tl.constexpr, CHUNK_X: tl.constexpr,
):  # fmt: skip
    """views[v] = a * (Wy @ (crop - fill) @ Wx^T) + b, all three channels of one [BLOCK_H, BLOCK_W] tile."""
    tiles_x: tl.constexpr = (OUT_W + BLOCK_W - 1) // BLOCK_W
    tiles: tl.constexpr = tiles_x * ((OUT_H + BLOCK_H - 1) // BLOCK_H)
    pid = tl.program_id(0).to(tl.int64)
    v = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    row, col = (tile // tiles_x) * BLOCK_H, (tile % tiles_x) * BLOCK_W
    rows, cols = row + tl.arange(0, BLOCK_H), col + tl.arange(0, BLOCK_W)
    x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = load_place(record, v)
    start, stride_y, stride_c, stride_x = load_steps(record, v)
    pointer = start.to(tl.pointer_type(ELEMENT))
    norm += v * (OUT_H + OUT_W)
    y_lo, y_hi = crop_range(row, row + BLOCK_H - 1, canvas_h, OUT_H, pad_y, h, KIND)
    x_lo, x_hi = crop_range(col, col + BLOCK_W - 1, canvas_w, OUT_W, pad_x, w, KIND)
    if x_hi <= x_lo:  # the tile lies in the padding
        y_hi = y_lo
    acc0 = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    acc1 = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    acc2 = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    norm_x = norm + OUT_H
    iy, ix = tl.arange(0, CHUNK_Y), tl.arange(0, CHUNK_X)
    wx = axis_weights(cols[None, :], (x_lo + ix + pad_x)[:, None], canvas_w, OUT_W, norm_x, KIND).to(DOT)
    for y_start in range(y_lo, y_hi, CHUNK_Y):
        y = y_start + iy
        h0 = tl.zeros([CHUNK_Y, BLOCK_W], tl.float32)
        h1 = tl.zeros([CHUNK_Y, BLOCK_W], tl.float32)
        h2 = tl.zeros([CHUNK_Y, BLOCK_W], tl.float32)
        if ONE_X:  # the whole window fits one chunk: its weights stay in registers
            inside = in_window(mask_table, v, y0, x0, y_start, x_lo, iy, ix, y_hi, x_hi, MASKED)
            pointers = chunk_pointers(pointer, y_start, x_lo, iy, ix, stride_y, stride_x)
            h0, h1, h2 = row_pass(h0, h1, h2, wx, pointers, stride_c, inside, fill0, fill1, fill2, DOT)
        else:
            for x_start in range(x_lo, x_hi, CHUNK_X):
                x = x_start + ix
                ws = axis_weights(cols[None, :], (x + pad_x)[:, None], canvas_w, OUT_W, norm_x, KIND).to(DOT)
                inside = in_window(mask_table, v, y0, x0, y_start, x_start, iy, ix, y_hi, x_hi, MASKED)
                pointers = chunk_pointers(pointer, y_start, x_start, iy, ix, stride_y, stride_x)
                h0, h1, h2 = row_pass(h0, h1, h2, ws, pointers, stride_c, inside, fill0, fill1, fill2, DOT)
        wy = axis_weights(rows[:, None], (y + pad_y)[None, :], canvas_h, OUT_H, norm, KIND).to(DOT)
        acc0 = tl.dot(wy, h0.to(DOT), acc0, input_precision="tf32x3")
        acc1 = tl.dot(wy, h1.to(DOT), acc1, input_precision="tf32x3")
        acc2 = tl.dot(wy, h2.to(DOT), acc2, input_precision="tf32x3")
    out += v * out_v
    offset = rows.to(tl.int64)[:, None] * out_y + cols.to(tl.int64)[None, :] * out_x
    inside = (rows < OUT_H)[:, None] & (cols < OUT_W)[None, :]
    store_tile(out, acc0, a0, b0, offset, inside)
    store_tile(out + out_c, acc1, a1, b1, offset, inside)
    store_tile(out + 2 * out_c, acc2, a2, b2, offset, inside)

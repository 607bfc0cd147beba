"""Kernels of `pil` mode: Pillow's integer resize, bit for bit, with int8 dots.

A coefficient has 22 fractional bits and a sign; split into three signed base-256 digits it becomes three exact int8 dots.
Pixels enter as level - 128, which fits int8; the sums of the coefficients put the 128 back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import channel, chunk_pointers, kept, source_of, store_tile
from .triton_weights import crop_range, cubic, load_place, place, store_place


@triton.jit
def pil_coefficients(coefficients, first_out, sums, n_in, OUT: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Integer coefficients [OUT, TAPS] of one axis, the first tap and the coefficient sum of each output.

    Every operation is in float64 and in Pillow's order, since the last bit decides how a coefficient rounds.
    """
    scale = tl.cast(n_in, tl.float64) / tl.cast(OUT, tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = stretch * (1 + KIND)
    inverse = 1.0 / stretch
    for start in range(0, OUT, BLOCK):
        i = start + tl.arange(0, BLOCK)
        centre = (i.to(tl.float64) + 0.5) * scale
        first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
        last = tl.minimum((centre + support + 0.5).to(tl.int32), n_in)
        total = tl.zeros([BLOCK], tl.float64)
        for k in range(0, TAPS):
            total += pil_weight(first, last, k, centre, inverse, KIND)
        total = tl.where(i < OUT, total, 1.0)  # lanes beyond the last output have no taps
        summed = tl.zeros([BLOCK], tl.int32)
        for k in range(0, TAPS):
            w = pil_weight(first, last, k, centre, inverse, KIND) / total
            c = (w * 4194304.0 + tl.where(w < 0, -0.5, 0.5)).to(tl.int32)
            summed += c
            tl.store(coefficients + i * TAPS + k, c, mask=i < OUT)
        tl.store(first_out + i, first, mask=i < OUT)
        tl.store(sums + i, summed, mask=i < OUT)


@triton.jit
def pil_weight(first, last, k, centre, inverse, KIND: tl.constexpr):
    """Weight of tap first + k in float64, 0 from `last` on."""
    t = tl.abs(((first + k).to(tl.float64) - centre + 0.5) * inverse)
    w = tl.maximum(1.0 - t, 0.0) if KIND == 0 else cubic(t, -0.5)
    return tl.where(first + k < last, w, 0.0)


@triton.jit(do_not_specialize=["n_images", "batch_h", "batch_w"])
def pil_prepare(
    boxes, index, table, n_images, batch_h, batch_w, margin, geometry, valid_out, coefficients, first, sums,
    OUT: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a view: placement, validity and the coefficients of its square canvas."""
    v = tl.program_id(0).to(tl.int64)
    valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = place(
        boxes, index, table, n_images, batch_h, batch_w, margin, v, RAGGED, True
    )
    store_place(geometry, valid_out, v, valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y)
    pil_coefficients(coefficients + v * OUT * TAPS, first + v * OUT, sums + v * OUT, canvas_w, OUT, KIND, TAPS, BLOCK)


@triton.jit
def taps_of(coefficients, first, outputs, taps, OUT: tl.constexpr, TAPS: tl.constexpr):
    """Coefficients of the broadcast shape (int32), 0 where an output does not use a tap."""
    known = outputs < OUT
    k = taps - tl.load(first + outputs, mask=known, other=0)
    return tl.load(coefficients + outputs * TAPS + k, mask=known & (k >= 0) & (k < TAPS), other=0)


@triton.jit
def digits(c):
    """int32 -> three signed base-256 digits, lowest first, as int8."""
    low = ((c + 128) & 255) - 128
    rest = (c - low) >> 8
    middle = ((rest + 128) & 255) - 128
    return low.to(tl.int8), middle.to(tl.int8), ((rest - middle) >> 8).to(tl.int8)


@triton.jit
def exact_dot(left, c0, c1, c2, acc):
    """acc + left @ c for int8 left and c in digits."""
    high = tl.dot(left, c2, out_dtype=tl.int32)
    middle = tl.dot(left, c1, out_dtype=tl.int32) + (high << 8)
    return tl.dot(left, c0, acc, out_dtype=tl.int32) + (middle << 8)


@triton.jit
def exact_dot_left(c0, c1, c2, level, acc):
    """acc + c @ (level - 128) for c in digits."""
    right = (level - 128).to(tl.int8)
    high = tl.dot(c2, right, out_dtype=tl.int32)
    middle = tl.dot(c1, right, out_dtype=tl.int32) + (high << 8)
    return tl.dot(c0, right, acc, out_dtype=tl.int32) + (middle << 8)


@triton.jit
def levels(pointers, inside, masked_out, fill):
    """Source levels - 128 as int8: 0 outside the crop, fill - 128 where the mask drops a pixel."""
    p = tl.load(pointers, mask=inside, other=0).to(tl.int32) - 128
    return tl.where(inside, p, tl.where(masked_out, fill - 128, 0)).to(tl.int8)


@triton.jit
def rounded(acc, outside, total, fill):
    """One pass's sums of (level - 128) -> levels, rounded and clipped as Pillow does; padding's taps weigh `outside`."""
    acc += outside * (fill - 128) + total * 128
    return tl.minimum(tl.maximum((acc + 2097152) >> 22, 0), 255)


@triton.jit(do_not_specialize=["stride_b", "stride_c", "stride_y", "stride_x", "fill0", "fill1", "fill2"])
def pil_forward(
    out, images, table, mask_table, index, geometry, coefficients, first, sums,
    stride_b, stride_c, stride_y, stride_x, out_v, out_c, out_y, out_x,
    fill0, fill1, fill2, a0, a1, a2, b0, b1, b2,
    OUT: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, RAGGED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK_Y: tl.constexpr, CHUNK_X: tl.constexpr,
):  # fmt: skip
    """All three channels of one [BLOCK_H, BLOCK_W] tile of one view: horizontal pass, uint8, vertical pass, normalise."""
    tiles_x: tl.constexpr = (OUT + BLOCK_W - 1) // BLOCK_W
    tiles: tl.constexpr = tiles_x * ((OUT + BLOCK_H - 1) // BLOCK_H)
    pid = tl.program_id(0).to(tl.int64)
    v = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    row, col = (tile // tiles_x) * BLOCK_H, (tile % tiles_x) * BLOCK_W
    rows, cols = row + tl.arange(0, BLOCK_H), col + tl.arange(0, BLOCK_W)
    x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = load_place(geometry, v)
    b = tl.where(w > 0, tl.load(index + v), 0)  # an invalid view may name no image
    pointer, stride_c, stride_y, stride_x = source_of(images, table, b, stride_b, stride_c, stride_y, stride_x, RAGGED)
    coefficients += v * OUT * TAPS
    first += v * OUT
    sums += v * OUT
    total_x = tl.load(sums + cols, mask=cols < OUT, other=0)[None, :]
    total_y = tl.load(sums + rows, mask=rows < OUT, other=0)[:, None]
    y_lo, y_hi = crop_range(row, row + BLOCK_H - 1, canvas_h, OUT, pad_y, h, KIND)
    x_lo, x_hi = crop_range(col, col + BLOCK_W - 1, canvas_w, OUT, pad_x, w, KIND)
    acc0 = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    acc1 = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    acc2 = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    inside_y = tl.zeros([BLOCK_H], tl.int32)
    iy, ix = tl.arange(0, CHUNK_Y), tl.arange(0, CHUNK_X)
    for y_start in range(y_lo, y_hi, CHUNK_Y):
        y = y_start + iy
        h0 = tl.zeros([CHUNK_Y, BLOCK_W], tl.int32)
        h1 = tl.zeros([CHUNK_Y, BLOCK_W], tl.int32)
        h2 = tl.zeros([CHUNK_Y, BLOCK_W], tl.int32)
        inside_x = tl.zeros([BLOCK_W], tl.int32)
        for x_start in range(x_lo, x_hi, CHUNK_X):
            x = x_start + ix
            cx = taps_of(coefficients, first, cols[None, :], (x + pad_x)[:, None], OUT, TAPS)
            cx = tl.where((x < x_hi)[:, None], cx, 0)
            inside_x += tl.sum(cx, 0)
            x_0, x_1, x_2 = digits(cx)
            in_crop = (y < y_hi)[:, None] & (x < x_hi)[None, :]
            inside = in_crop
            if MASKED:
                inside = in_crop & kept(mask_table, v, y0 + y_start, x0 + x_start, iy, ix)
            dropped = in_crop & (inside == 0)
            p = chunk_pointers(pointer, y0 + y_start, x0 + x_start, iy, ix, stride_y, stride_x, PACKED)
            h0 = exact_dot(levels(p, inside, dropped, fill0), x_0, x_1, x_2, h0)
            h1 = exact_dot(levels(channel(p, stride_c, 1, PACKED), inside, dropped, fill1), x_0, x_1, x_2, h1)
            h2 = exact_dot(levels(channel(p, stride_c, 2, PACKED), inside, dropped, fill2), x_0, x_1, x_2, h2)
        cy = taps_of(coefficients, first, rows[:, None], (y + pad_y)[None, :], OUT, TAPS)
        cy = tl.where((y < y_hi)[None, :], cy, 0)
        inside_y += tl.sum(cy, 1)
        outside = total_x - inside_x[None, :]
        y_0, y_1, y_2 = digits(cy)
        acc0 = exact_dot_left(y_0, y_1, y_2, rounded(h0, outside, total_x, fill0), acc0)
        acc1 = exact_dot_left(y_0, y_1, y_2, rounded(h1, outside, total_x, fill1), acc1)
        acc2 = exact_dot_left(y_0, y_1, y_2, rounded(h2, outside, total_x, fill2), acc2)
    out += v * out_v
    offset = rows.to(tl.int64)[:, None] * out_y + cols.to(tl.int64)[None, :] * out_x
    inside = (rows < OUT)[:, None] & (cols < OUT)[None, :]
    outside = total_y - inside_y[:, None]
    store_tile(out, (rounded(acc0, outside, total_y, fill0) - fill0).to(tl.float32), a0, b0, offset, inside)
    store_tile(out + out_c, (rounded(acc1, outside, total_y, fill1) - fill1).to(tl.float32), a1, b1, offset, inside)
    store_tile(out + 2 * out_c, (rounded(acc2, outside, total_y, fill2) - fill2).to(tl.float32), a2, b2, offset, inside)

"""Kernels of `pil` mode: Pillow's integer resize, bit for bit.

The horizontal pass sums integers on CUDA cores, as triton_uint8 does in float32. The vertical pass uses tensor cores: a
coefficient has 22 fractional bits and a sign; split into three signed base-256 digits it becomes three exact int8 dots. Levels
enter as level - 128, which fits int8; the sums of the coefficients put the 128 back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_place import RECORD, load_place, load_steps, place, store_record
from .triton_uint8 import store_tile
from .triton_weights import crop_range, cubic
from .triton_words import byte_level, funnel, kept_bits, load_word, mask_place, next_word


@triton.jit
def pil_coefficients(coefficients, first_out, sums, n_in, OUT: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Integer coefficients [OUT, TAPS] of one axis, the first tap and the coefficient sum of each output.

    Every operation is in float64 and in Pillow's order, since the last bit can change how a coefficient is rounded.
    """
    scale = tl.cast(n_in, tl.float64) / tl.cast(OUT, tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = stretch * (1 + KIND)
    inverse = 1.0 / stretch
    for start in range(0, OUT, BLOCK):
        i = start + tl.arange(0, BLOCK)
        center = (i.to(tl.float64) + 0.5) * scale
        first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
        last = tl.minimum((center + support + 0.5).to(tl.int32), n_in)
        total = tl.zeros([BLOCK], tl.float64)
        for k in range(0, TAPS):
            total += pil_weight(first, last, k, center, inverse, KIND)
        total = tl.where(i < OUT, total, 1.0)  # lanes beyond the last output have no taps
        summed = tl.zeros([BLOCK], tl.int32)
        for k in range(0, TAPS):
            w = pil_weight(first, last, k, center, inverse, KIND) / total
            c = (w * 4194304.0 + tl.where(w < 0, -0.5, 0.5)).to(tl.int32)
            summed += c
            tl.store(coefficients + i * TAPS + k, c, mask=i < OUT)
        tl.store(first_out + i, first, mask=i < OUT)
        tl.store(sums + i, summed, mask=i < OUT)


@triton.jit
def pil_weight(first, last, k, center, inverse, KIND: tl.constexpr):
    """Weight of tap first + k in float64, 0 from `last` on."""
    t = tl.abs(((first + k).to(tl.float64) - center + 0.5) * inverse)
    w = tl.maximum(1.0 - t, 0.0) if KIND == 0 else cubic(t, -0.5)
    return tl.where(first + k < last, w, 0.0)


@triton.jit(do_not_specialize=["n_images", "batch_h", "batch_w", "columns", "stride_b", "stride_c", "stride_y", "stride_x"])
def pil_prepare(
    boxes, index, images, table, n_images, batch_h, batch_w, columns, stride_b, stride_c, stride_y, stride_x, margin,
    record, valid_out, coefficients, first, sums,
    OUT: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per view: its record, validity and the coefficients of its square canvas."""
    v = tl.program_id(0).to(tl.int64)
    valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = place(
        boxes, index, table, n_images, batch_h, batch_w, margin, v, RAGGED, True
    )
    store_record(
        record, valid_out, images, index, table, stride_b, stride_c, stride_y, stride_x, columns, v,
        valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y, RAGGED,
    )  # fmt: skip
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
    """Return acc + left @ c for int8 left and c in digits."""
    high = tl.dot(left, c2, out_dtype=tl.int32)
    middle = tl.dot(left, c1, out_dtype=tl.int32) + (high << 8)
    return tl.dot(left, c0, acc, out_dtype=tl.int32) + (middle << 8)


@triton.jit
def coefficient(row, k, j, lo, hi, TAPS: tl.constexpr):
    """Coefficient k of an output, that of its crop column j; 0 outside [lo, hi)."""
    return tl.load(row + k, mask=(k >= 0) & (k < TAPS) & (j >= lo) & (j < hi), other=0)


@triton.jit
def add_level(h, c, four, n: tl.constexpr, kept, k: tl.constexpr, fill, MASKED: tl.constexpr):
    """Add byte n of a word times a coefficient to a sum; `fill` in its place if bit k of `kept` is not set."""
    level = byte_level(four, n)
    if MASKED:
        level = tl.where(((kept >> k) & 1) != 0, level, fill)
    return h + c * level


@triton.jit
def pil_packed(
    words, off, kept, x, lo, hi, row, skip, fill0, fill1, fill2, h0, h1, h2, T: tl.constexpr, TAPS: tl.constexpr,
    MASKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add T packed pixels from byte `off` on, crop columns x .. x + T - 1, to the sums of three channels."""
    word = load_word(words, off >> 2)
    for n in tl.static_range(3 * T):
        if n % 4 == 0:
            after = next_word(words, off, word, n // 4, 3 * T)
            four = funnel(word, after, off, ASM)
            word = after
        if n % 3 == 0:
            c = coefficient(row, skip + x + n // 3, x + n // 3, lo, hi, TAPS)
            h0 = add_level(h0, c, four, n % 4, kept, n // 3, fill0, MASKED)
        elif n % 3 == 1:
            h1 = add_level(h1, c, four, n % 4, kept, n // 3, fill1, MASKED)
        else:
            h2 = add_level(h2, c, four, n % 4, kept, n // 3, fill2, MASKED)
    return h0, h1, h2


@triton.jit
def pil_planar(
    words, off, kept, x, lo, hi, row, skip, fill, h, T: tl.constexpr, TAPS: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """Add T pixels of one plane from byte `off` on to the sums of its channel."""
    word = load_word(words, off >> 2)
    for n in tl.static_range(T):
        if n % 4 == 0:
            after = next_word(words, off, word, n // 4, T)
            four = funnel(word, after, off, ASM)
            word = after
        c = coefficient(row, skip + x + n, x + n, lo, hi, TAPS)
        h = add_level(h, c, four, n % 4, kept, n, fill, MASKED)
    return h


@triton.jit
def pil_window(
    words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, first, columns, w, row, skip, fill0, fill1, fill2,
    h0, h1, h2, inside,
    T: tl.constexpr, TAPS: tl.constexpr, PIXEL: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add crop columns first .. first + T - 1, and their coefficients to `inside`; as triton_uint8.window."""
    x = tl.minimum(first, columns - T)
    hi = tl.minimum(first + T, w)
    for k in tl.static_range(T):
        inside += coefficient(row, skip + x + k, x + k, first, hi, TAPS)
    kept = 0
    if MASKED:
        kept = kept_bits(mask_start, mask_step, mask_rows, mask_columns, y, x, T, ASM)
    if PIXEL == 3:
        h0, h1, h2 = pil_packed(
            words, at + 3 * x, kept, x, first, hi, row, skip, fill0, fill1, fill2, h0, h1, h2, T, TAPS, MASKED, ASM
        )
    else:
        off = at + x
        h0 = pil_planar(words, off, kept, x, first, hi, row, skip, fill0, h0, T, TAPS, MASKED, ASM)
        h1 = pil_planar(words, off + plane, kept, x, first, hi, row, skip, fill1, h1, T, TAPS, MASKED, ASM)
        h2 = pil_planar(words, off + 2 * plane, kept, x, first, hi, row, skip, fill2, h2, T, TAPS, MASKED, ASM)
    return h0, h1, h2, inside


@triton.jit
def level8(acc, outside, fill):
    """The horizontal pass's sums -> levels, rounded and clipped as Pillow does, minus 128 as int8."""
    level = (acc + outside * fill + 2097152) >> 22
    return (tl.minimum(tl.maximum(level, 0), 255) - 128).to(tl.int8)


@triton.jit
def rounded(acc, outside, total, fill):
    """The vertical pass's sums of (level - 128) -> levels, rounded and clipped; padding's taps weigh `outside`."""
    acc += outside * (fill - 128) + total * 128
    return tl.minimum(tl.maximum((acc + 2097152) >> 22, 0), 255)


@triton.jit(do_not_specialize=["fill0", "fill1", "fill2"])
def pil_forward(
    out, record, mask_table, coefficients, first_of, sums, out_v, out_c, out_y, out_x,
    fill0, fill1, fill2, a0, a1, a2, b0, b1, b2,
    OUT: tl.constexpr, KIND: tl.constexpr, TAPS: tl.constexpr, PIXEL: tl.constexpr, MIXED: tl.constexpr, MASKED: tl.constexpr,
    ASM: tl.constexpr, T1: tl.constexpr, LOOP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK_Y: tl.constexpr,
):  # fmt: skip
    """All three channels of one [BLOCK_W, BLOCK_H] tile of one view: horizontal pass, uint8, vertical pass, normalize.

    PIXEL, MIXED as in triton_uint8. Views of up to T1 taps per column use one window, wider ones loop over windows of LOOP taps.
    """
    tiles_x: tl.constexpr = (OUT + BLOCK_W - 1) // BLOCK_W
    tiles: tl.constexpr = tiles_x * ((OUT + BLOCK_H - 1) // BLOCK_H)
    pid = tl.program_id(0)
    v = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    start, row_step, plane, pixel = load_steps(record, v)
    if MIXED and pixel != PIXEL:
        return
    row_step, plane = row_step.to(tl.int32), plane.to(tl.int32)
    x0, y0, w, h, side, _, pad_x, pad_y = load_place(record, v)
    columns = tl.load(record + v * RECORD + 12).to(tl.int32)
    mask_start, mask_step, mask_rows, mask_columns = start, start, h, w
    if MASKED:
        mask_start, mask_step, mask_rows, mask_columns = mask_place(mask_table, v, y0, x0)
    row, col = (tile // tiles_x) * BLOCK_H, (tile % tiles_x) * BLOCK_W
    rows, cols = row + tl.arange(0, BLOCK_H), col + tl.arange(0, BLOCK_W)
    coefficients += v * OUT * TAPS
    first_of += v * OUT
    sums += v * OUT
    total_x = tl.load(sums + cols, mask=cols < OUT, other=0)[:, None]
    total_y = tl.load(sums + rows, mask=rows < OUT, other=0)[None, :]
    y_lo, y_hi = crop_range(row, row + BLOCK_H - 1, side, OUT, pad_y, h, KIND)
    x_lo, x_hi = crop_range(col, col + BLOCK_W - 1, side, OUT, pad_x, w, KIND)
    if x_hi <= x_lo:  # no column of the crop: rows of pure fill stay fill
        y_hi = y_lo
    canvas_first = tl.load(first_of + cols, mask=cols < OUT, other=0)[:, None]
    first = tl.maximum(canvas_first - pad_x, 0)
    skip = pad_x - canvas_first  # crop column j has coefficient skip + j
    mine = coefficients + tl.minimum(cols, OUT - 1)[:, None] * TAPS
    needed = tl.minimum((tl.maximum(side, OUT) * (2 + 2 * KIND) + OUT - 1) // OUT + 1, x_hi - x_lo)
    acc0 = tl.zeros([BLOCK_W, BLOCK_H], tl.int32)
    acc1 = tl.zeros([BLOCK_W, BLOCK_H], tl.int32)
    acc2 = tl.zeros([BLOCK_W, BLOCK_H], tl.int32)
    inside_y = tl.zeros([BLOCK_H], tl.int32)
    iy = tl.arange(0, CHUNK_Y)
    for y_start in range(y_lo, y_hi, CHUNK_Y):
        base = start + tl.cast(y_start, tl.int64) * row_step
        aligned = (base >> 2) << 2
        words = aligned.to(tl.pointer_type(tl.uint32))
        ahead = tl.minimum(iy, y_hi - 1 - y_start)
        at = (ahead * row_step + (base - aligned).to(tl.int32))[None, :]
        y = (y_start + ahead)[None, :]
        h0 = tl.zeros([BLOCK_W, CHUNK_Y], tl.int32)
        h1 = tl.zeros([BLOCK_W, CHUNK_Y], tl.int32)
        h2 = tl.zeros([BLOCK_W, CHUNK_Y], tl.int32)
        inside = tl.zeros([BLOCK_W, 1], tl.int32)
        if needed <= T1:
            h0, h1, h2, inside = pil_window(
                words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, first, columns, w, mine, skip,
                fill0, fill1, fill2, h0, h1, h2, inside, T1, TAPS, PIXEL, MASKED, ASM,
            )  # fmt: skip
        else:
            for g in range(0, (needed + LOOP - 1) // LOOP):
                h0, h1, h2, inside = pil_window(
                    words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, first + LOOP * g, columns, w, mine, skip,
                    fill0, fill1, fill2, h0, h1, h2, inside, LOOP, TAPS, PIXEL, MASKED, ASM,
                )  # fmt: skip
        j = y_start + iy
        cy = taps_of(coefficients, first_of, rows[None, :], (j + pad_y)[:, None], OUT, TAPS)
        cy = tl.where((j < y_hi)[:, None], cy, 0)
        inside_y += tl.sum(cy, 0)
        y_0, y_1, y_2 = digits(cy)
        outside = total_x - inside
        acc0 = exact_dot(level8(h0, outside, fill0), y_0, y_1, y_2, acc0)
        acc1 = exact_dot(level8(h1, outside, fill1), y_0, y_1, y_2, acc1)
        acc2 = exact_dot(level8(h2, outside, fill2), y_0, y_1, y_2, acc2)
    out += v * out_v
    offset = rows[None, :] * out_y + cols[:, None] * out_x
    ok = (rows < OUT)[None, :] & (cols < OUT)[:, None]
    outside = total_y - inside_y[None, :]
    store_tile(out, (rounded(acc0, outside, total_y, fill0) - fill0).to(tl.float32), a0, b0, offset, ok)
    store_tile(out + out_c, (rounded(acc1, outside, total_y, fill1) - fill1).to(tl.float32), a1, b1, offset, ok)
    store_tile(out + 2 * out_c, (rounded(acc2, outside, total_y, fill2) - fill2).to(tl.float32), a2, b2, offset, ok)

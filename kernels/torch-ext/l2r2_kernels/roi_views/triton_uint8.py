"""Forward kernel of `float` mode for uint8 images with antialias: both passes of the resize, one program per tile of a view.

The horizontal pass runs on CUDA cores: 32 lanes along the columns of the output read neighboring words (see triton_words), and a
column's few taps are summed in float32. The vertical pass is a dot on tensor cores. Tiles are [columns, rows] for that reason.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_place import RECORD, load_place, load_steps
from .triton_weights import cubic
from .triton_words import byte_float, funnel, kept_bits, load_word, mask_place, next_word


@triton.jit
def tap_bounds(n_in, N_OUT: tl.constexpr, KIND: tl.constexpr):
    """(half width of the kernel in units of 1 / (2 * N_OUT) input pixels, a multiple of 2 * N_OUT above it)."""
    half = tl.maximum(n_in, N_OUT) * (2 + 2 * KIND)
    return half, half // (2 * N_OUT) + 1


@triton.jit
def first_tap(i, n_in, N_OUT: tl.constexpr, half, above):
    """Smallest input j within reach of output i: |(2i + 1) n_in - (2j + 1) N_OUT| < half."""
    return ((2 * i + 1) * n_in - half - N_OUT + (2 * N_OUT) * above) // (2 * N_OUT) - above + 1


@triton.jit
def last_tap(i, n_in, N_OUT: tl.constexpr, half, above):
    """Largest input j within reach of output i."""
    return ((2 * i + 1) * n_in + half - N_OUT - 1 + (2 * N_OUT) * above) // (2 * N_OUT) - above


@triton.jit
def kernel_at(t, KIND: tl.constexpr):
    """Resampling kernel at distance t >= 0."""
    return tl.maximum(1.0 - t, 0.0) if KIND == 0 else cubic(t, -0.5)


@triton.jit
def tap_weight(j, lo, hi, center, step, KIND: tl.constexpr):
    """Weight of crop column j, not yet divided by the sum; 0 outside [lo, hi). All columns count from the tile's first."""
    return tl.where((j >= lo) & (j < hi), kernel_at(tl.abs(center - j.to(tl.float32) * step), KIND), 0.0)


@triton.jit
def packed_taps(
    words, off, kept, bias, j, lo, hi, center, step, zero0, zero1, zero2, h0, h1, h2,
    T: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add T packed pixels from byte `off` on to the sums of three channels.

    MASKED: minus the levels `zero0` .. `zero2`, and nothing where bit k of `kept` is not set; otherwise those are in the sums.
    """
    word = load_word(words, off >> 2)
    for n in tl.static_range(3 * T):
        if n % 4 == 0:
            after = next_word(words, off, word, n // 4, 3 * T)
            four = funnel(word, after, off, ASM)
            word = after
        if n % 3 == 0:
            w = tap_weight(j + n // 3, lo, hi, center, step, KIND)
            if MASKED:
                w = tl.where(((kept >> (n // 3)) & 1) != 0, w, 0.0)
        level = byte_float(four, n % 4, bias, BIASED, ASM)
        if n % 3 == 0:
            h0 += w * (level - zero0 if MASKED else level)
        elif n % 3 == 1:
            h1 += w * (level - zero1 if MASKED else level)
        else:
            h2 += w * (level - zero2 if MASKED else level)
    return h0, h1, h2


@triton.jit
def planar_taps(
    words, off, kept, bias, j, lo, hi, center, step, zero, h,
    T: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add T pixels of one plane from byte `off` on to the sums of its channel; see packed_taps."""
    word = load_word(words, off >> 2)
    for n in tl.static_range(T):
        if n % 4 == 0:
            after = next_word(words, off, word, n // 4, T)
            four = funnel(word, after, off, ASM)
            word = after
        w = tap_weight(j + n, lo, hi, center, step, KIND)
        if MASKED:
            w = tl.where(((kept >> n) & 1) != 0, w, 0.0)
        level = byte_float(four, n % 4, bias, BIASED, ASM)
        h += w * (level - zero if MASKED else level)
    return h


@triton.jit
def window(
    words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, bias,
    first, origin, columns, w, center, step, zero0, zero1, zero2, h0, h1, h2,
    T: tl.constexpr, KIND: tl.constexpr, PIXEL: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add crop columns first .. first + T - 1 of the rows at byte `at` to the sums of a tile of columns.

    A window that would extend beyond the image starts further left; the extra pixels have weight 0.
    """
    x = tl.minimum(first, columns - T)
    j, lo, hi = x - origin, first - origin, tl.minimum(first + T, w) - origin
    kept = 0
    if MASKED:
        kept = kept_bits(mask_start, mask_step, mask_rows, mask_columns, y, x, T, ASM)
    if PIXEL == 3:
        h0, h1, h2 = packed_taps(
            words, at + 3 * x, kept, bias, j, lo, hi, center, step, zero0, zero1, zero2, h0, h1, h2, T, KIND, MASKED, BIASED, ASM
        )
    else:
        off = at + x
        h0 = planar_taps(words, off, kept, bias, j, lo, hi, center, step, zero0, h0, T, KIND, MASKED, BIASED, ASM)
        off += plane
        h1 = planar_taps(words, off, kept, bias, j, lo, hi, center, step, zero1, h1, T, KIND, MASKED, BIASED, ASM)
        off += plane
        h2 = planar_taps(words, off, kept, bias, j, lo, hi, center, step, zero2, h2, T, KIND, MASKED, BIASED, ASM)
    return h0, h1, h2


@triton.jit
def store_tile(out, acc, a, b, offset, inside):
    """Normalize and store one channel of a tile."""
    tl.store(out + offset, (acc * a + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def forward_uint8(
    out, record, mask_table, norm, out_v, out_c, out_y, out_x, fill0, fill1, fill2, a0, a1, a2, b0, b1, b2,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, KIND: tl.constexpr, PIXEL: tl.constexpr, MIXED: tl.constexpr, MASKED: tl.constexpr,
    DOT: tl.constexpr, BIASED: tl.constexpr, ASM: tl.constexpr,
    T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr, LOOPED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK_Y: tl.constexpr,
):  # fmt: skip
    """views[v] = a * (Wy @ (crop - fill) @ Wx^T) + b, all three channels of one [BLOCK_W, BLOCK_H] tile.

    PIXEL: 3 for packed images (HWC), 1 for planes (CHW); MIXED: views of the other layout are skipped.
    T1 < T2: taps per column for which a view uses one window; a wider view uses one of T3 taps, or a loop of these if LOOPED.
    BIASED: levels enter as 32768 + level; the rounding error is below the resolution of float16 output.
    """
    tiles_x: tl.constexpr = (OUT_W + BLOCK_W - 1) // BLOCK_W
    tiles: tl.constexpr = tiles_x * ((OUT_H + BLOCK_H - 1) // BLOCK_H)
    pid = tl.program_id(0)
    v = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    start, row_step, plane, pixel = load_steps(record, v)
    if MIXED and pixel != PIXEL:
        return
    row_step, plane = row_step.to(tl.int32), plane.to(tl.int32)
    x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = load_place(record, v)
    columns = tl.load(record + v * RECORD + 12).to(tl.int32)
    bias = tl.load(record + v * RECORD + 13).to(tl.uint32)
    mask_start, mask_step, mask_rows, mask_columns = start, start, h, w
    if MASKED:
        mask_start, mask_step, mask_rows, mask_columns = mask_place(mask_table, v, y0, x0)
    norm += v * (OUT_H + OUT_W)
    row, col = (tile // tiles_x) * BLOCK_H, (tile % tiles_x) * BLOCK_W
    rows, cols = row + tl.arange(0, BLOCK_H), col + tl.arange(0, BLOCK_W)

    half_x, above_x = tap_bounds(canvas_w, OUT_W, KIND)
    x_lo = tl.maximum(first_tap(col, canvas_w, OUT_W, half_x, above_x) - pad_x, 0)
    x_hi = tl.minimum(last_tap(tl.minimum(col + BLOCK_W, OUT_W) - 1, canvas_w, OUT_W, half_x, above_x) - pad_x + 1, w)
    taps = tl.minimum((half_x + OUT_W - 1) // OUT_W, x_hi - x_lo)
    first = tl.maximum(first_tap(cols, canvas_w, OUT_W, half_x, above_x) - pad_x, 0)[:, None]
    inverse_x = 0.5 / tl.maximum(canvas_w, OUT_W).to(tl.float32)
    step_x = (2 * OUT_W) * inverse_x
    # distances are relative to the crop column x_lo, so that they stay small and exact
    center_x = (((2 * cols + 1) * canvas_w - (2 * (x_lo + pad_x) + 1) * OUT_W).to(tl.float32) * inverse_x)[:, None]
    shift: tl.constexpr = 32768.0 if BIASED else 0.0
    zero0, zero1, zero2 = fill0 + shift, fill1 + shift, fill2 + shift  # fill, as levels are read
    total = tl.zeros([BLOCK_W, 1], tl.float32)
    if not MASKED:  # the weights that fall on the crop are the same in every row
        for k in range(0, taps):
            total += tap_weight(first - x_lo + k, first - x_lo, w - x_lo, center_x, step_x, KIND)

    half_y, above_y = tap_bounds(canvas_h, OUT_H, KIND)
    y_lo = tl.maximum(first_tap(row, canvas_h, OUT_H, half_y, above_y) - pad_y, 0)
    y_hi = tl.minimum(last_tap(tl.minimum(row + BLOCK_H, OUT_H) - 1, canvas_h, OUT_H, half_y, above_y) - pad_y + 1, h)
    if x_hi <= x_lo:  # the tile lies in the padding
        y_hi = y_lo
    inverse_y = 0.5 / tl.maximum(canvas_h, OUT_H).to(tl.float32)
    step_y = (2 * OUT_H) * inverse_y
    center_y = (((2 * rows + 1) * canvas_h - (2 * (y_lo + pad_y) + 1) * OUT_H).to(tl.float32) * inverse_y)[None, :]
    iy = tl.arange(0, CHUNK_Y)
    acc0 = tl.zeros([BLOCK_W, BLOCK_H], tl.float32)
    acc1 = tl.zeros([BLOCK_W, BLOCK_H], tl.float32)
    acc2 = tl.zeros([BLOCK_W, BLOCK_H], tl.float32)
    for y_start in range(y_lo, y_hi, CHUNK_Y):
        base = start + tl.cast(y_start, tl.int64) * row_step
        aligned = (base >> 2) << 2
        words = aligned.to(tl.pointer_type(tl.uint32))
        ahead = tl.minimum(iy, y_hi - 1 - y_start)
        at = (ahead * row_step + (base - aligned).to(tl.int32))[None, :]
        y = (y_start + ahead)[None, :]
        blank = tl.zeros([BLOCK_W, CHUNK_Y], tl.float32)
        h0, h1, h2 = blank - total * zero0, blank - total * zero1, blank - total * zero2
        if taps <= T1:
            h0, h1, h2 = window(
                words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, bias, first, x_lo, columns, w,
                center_x, step_x, zero0, zero1, zero2, h0, h1, h2, T1, KIND, PIXEL, MASKED, BIASED, ASM,
            )  # fmt: skip
        elif taps <= T2:
            h0, h1, h2 = window(
                words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, bias, first, x_lo, columns, w,
                center_x, step_x, zero0, zero1, zero2, h0, h1, h2, T2, KIND, PIXEL, MASKED, BIASED, ASM,
            )  # fmt: skip
        elif LOOPED:
            for g in range(0, (taps + T3 - 1) // T3):
                h0, h1, h2 = window(
                    words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, bias, first + T3 * g, x_lo, columns, w,
                    center_x, step_x, zero0, zero1, zero2, h0, h1, h2, T3, KIND, PIXEL, MASKED, BIASED, ASM,
                )  # fmt: skip
        else:
            h0, h1, h2 = window(
                words, at, plane, y, mask_start, mask_step, mask_rows, mask_columns, bias, first, x_lo, columns, w,
                center_x, step_x, zero0, zero1, zero2, h0, h1, h2, T3, KIND, PIXEL, MASKED, BIASED, ASM,
            )  # fmt: skip
        j = y_start - y_lo + iy
        wy = kernel_at(tl.abs(center_y - (j.to(tl.float32) * step_y)[:, None]), KIND)
        wy = tl.where((j < h - y_lo)[:, None], wy, 0.0).to(DOT)
        acc0 = tl.dot(h0.to(DOT), wy, acc0, input_precision="tf32x3")
        acc1 = tl.dot(h1.to(DOT), wy, acc1, input_precision="tf32x3")
        acc2 = tl.dot(h2.to(DOT), wy, acc2, input_precision="tf32x3")

    norm_x = tl.load(norm + OUT_H + cols, mask=cols < OUT_W, other=0.0)[:, None]
    scale = norm_x * tl.load(norm + rows, mask=rows < OUT_H, other=0.0)[None, :]
    out += v * out_v
    offset = rows[None, :] * out_y + cols[:, None] * out_x
    inside = (rows < OUT_H)[None, :] & (cols < OUT_W)[:, None]
    store_tile(out, acc0 * scale, a0, b0, offset, inside)
    store_tile(out + out_c, acc1 * scale, a1, b1, offset, inside)
    store_tile(out + 2 * out_c, acc2 * scale, a2, b2, offset, inside)

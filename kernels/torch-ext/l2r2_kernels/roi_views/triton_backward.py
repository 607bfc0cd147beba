"""Backward kernel of `float` mode: `Wy^T (a * grad) Wx` gathered per tile of the input, views in a fixed order.

Every input pixel is written by one program that adds its views one after the other: no atomics, bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import kept
from .triton_place import load_place
from .triton_weights import reach, tap_range, weight


@triton.jit
def output_range(first, last, n_in, N_OUT: tl.constexpr, pad, extent, KIND: tl.constexpr):
    """Outputs [lo, hi) that touch the crop positions first..last; empty if they lie outside the crop."""
    width = reach(n_in, N_OUT, KIND)
    start, end = tl.maximum(first, 0) + pad, tl.minimum(last, extent - 1) + pad
    lo, hi = tap_range(start, end, N_OUT, n_in, width)
    hi = tl.where(end >= start, tl.minimum(hi, N_OUT), 0)
    return tl.maximum(lo, 0), hi


@triton.jit
def weights_of(outputs, taps, n_in, N_OUT: tl.constexpr, norm, KIND: tl.constexpr):
    """Weights of the broadcast shape; 0 for outputs that do not exist."""
    w = weight(outputs, taps, n_in, N_OUT, KIND)
    if KIND <= 1:
        return w * tl.load(norm + outputs, mask=outputs < N_OUT, other=0.0)
    return tl.where(outputs < N_OUT, w, 0.0)


@triton.jit(do_not_specialize=["height", "width", "grad_v", "grad_c", "grad_y", "grad_x"])
def backward(
    grad, grad_in, mask_table, order, starts, record, norm,
    height, width, grad_v, grad_c, grad_y, grad_x, a0, a1, a2,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, CHUNK_I: tl.constexpr, CHUNK_J: tl.constexpr,
):  # fmt: skip
    """grad_in[b, :, tile] (contiguous) from the grads of image b's views; grad comes with any strides."""
    tiles_x = tl.cdiv(width, BLOCK_X)
    tiles = tiles_x * tl.cdiv(height, BLOCK_Y)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // tiles
    tile = (pid % tiles).to(tl.int32)
    ys, xs = (tile // tiles_x) * BLOCK_Y, (tile % tiles_x) * BLOCK_X
    y, x = ys + tl.arange(0, BLOCK_Y), xs + tl.arange(0, BLOCK_X)
    ii, jj = tl.arange(0, CHUNK_I), tl.arange(0, CHUNK_J)
    acc0 = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    acc1 = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    acc2 = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    for n in range(tl.load(starts + b), tl.load(starts + b + 1)):
        v = tl.load(order + n)
        x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = load_place(record, v)
        i_lo, i_hi = output_range(ys - y0, ys - y0 + BLOCK_Y - 1, canvas_h, OUT_H, pad_y, h, KIND)
        j_lo, j_hi = output_range(xs - x0, xs - x0 + BLOCK_X - 1, canvas_w, OUT_W, pad_x, w, KIND)
        if j_hi <= j_lo:
            i_hi = i_lo
        norm_y = norm + v * (OUT_H + OUT_W)
        view0 = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        view1 = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        view2 = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
        for i_start in range(i_lo, i_hi, CHUNK_I):
            i = i_start + ii
            t0 = tl.zeros([CHUNK_I, BLOCK_X], tl.float32)
            t1 = tl.zeros([CHUNK_I, BLOCK_X], tl.float32)
            t2 = tl.zeros([CHUNK_I, BLOCK_X], tl.float32)
            for j_start in range(j_lo, j_hi, CHUNK_J):
                j = j_start + jj
                wx = weights_of(j[:, None], (x - x0 + pad_x)[None, :], canvas_w, OUT_W, norm_y + OUT_H, KIND)
                inside = (i < i_hi)[:, None] & (j < j_hi)[None, :]
                g = grad + v * grad_v + tl.cast(i_start, tl.int64) * grad_y + tl.cast(j_start, tl.int64) * grad_x
                g += ii[:, None] * tl.cast(grad_y, tl.int32) + jj[None, :] * tl.cast(grad_x, tl.int32)
                t0 = tl.dot(tl.load(g, mask=inside, other=0).to(tl.float32), wx, t0, input_precision="tf32x3")
                t1 = tl.dot(tl.load(g + grad_c, mask=inside, other=0).to(tl.float32), wx, t1, input_precision="tf32x3")
                t2 = tl.dot(tl.load(g + 2 * grad_c, mask=inside, other=0).to(tl.float32), wx, t2, input_precision="tf32x3")
            wy = weights_of(i[None, :], (y - y0 + pad_y)[:, None], canvas_h, OUT_H, norm_y, KIND)
            view0 = tl.dot(wy, t0, view0, input_precision="tf32x3")
            view1 = tl.dot(wy, t1, view1, input_precision="tf32x3")
            view2 = tl.dot(wy, t2, view2, input_precision="tf32x3")
        here = ((y >= y0) & (y < y0 + h))[:, None] & ((x >= x0) & (x < x0 + w))[None, :]
        if MASKED:
            here = here & kept(mask_table, v, ys, xs, tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_X))
        acc0 += tl.where(here, view0, 0.0)
        acc1 += tl.where(here, view1, 0.0)
        acc2 += tl.where(here, view2, 0.0)
    plane = height.to(tl.int64) * width
    offset = grad_in + b * 3 * plane + y.to(tl.int64)[:, None] * width + x.to(tl.int64)[None, :]
    exists = (y < height)[:, None] & (x < width)[None, :]
    element = grad_in.dtype.element_ty
    tl.store(offset, (acc0 * a0).to(element), mask=exists)
    tl.store(offset + plane, (acc1 * a1).to(element), mask=exists)
    tl.store(offset + 2 * plane, (acc2 * a2).to(element), mask=exists)

"""Resampling weights in registers, and the small kernels that place every view before the pixels are touched.

Distances are kept as integers: output i and input j are `|(2i+1) * n_in - (2j+1) * n_out| / (2 * n_out)` pixels apart, exactly,
so float32 weights carry no error of a large coordinate. Sizes are limited to keep these products in 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How a weight follows from the distance (the constexpr KIND).
KINDS = {("bilinear", True): 0, ("bicubic", True): 1, ("bilinear", False): 2, ("bicubic", False): 3}
GEOMETRY = 8  # x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y: see reference.Geometry


@triton.jit
def cubic(t, a: tl.constexpr):
    """Cubic convolution with parameter a at distance t >= 0."""
    near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    far = (((t - 5.0) * t + 8.0) * t - 4.0) * a
    return tl.where(t < 1.0, near, tl.where(t < 2.0, far, 0.0))


@triton.jit
def weight(i, j, n_in, N_OUT: tl.constexpr, KIND: tl.constexpr):
    """Weight of input j for output i, before the sum over j is divided out (antialias), float32 of the broadcast shape."""
    if KIND <= 1:
        distance = tl.abs((2 * i + 1) * n_in - (2 * j + 1) * N_OUT).to(tl.float32)
        t = distance * (0.5 / tl.maximum(n_in, N_OUT).to(tl.float32))
        w = tl.maximum(1.0 - t, 0.0) if KIND == 0 else cubic(t, -0.5)
    elif KIND == 2:
        source = tl.minimum(tl.maximum((2 * i + 1) * n_in - N_OUT, 0), 2 * N_OUT * (n_in - 1))
        w = tl.maximum(1.0 - tl.abs(source - 2 * N_OUT * j).to(tl.float32) * (0.5 / N_OUT), 0.0)
    else:
        source = (2 * i + 1) * n_in - N_OUT
        first = (source + 2 * N_OUT) // (2 * N_OUT) - 1  # floor: source > -2 * N_OUT
        w = tl.zeros_like((i + j).to(tl.float32))
        for k in tl.static_range(4):
            tap = first + (k - 1)
            here = tl.minimum(tl.maximum(tap, 0), n_in - 1) == j  # taps beyond the border repeat the border pixel
            w += tl.where(here, cubic(tl.abs(tap * (2 * N_OUT) - source).to(tl.float32) * (0.5 / N_OUT), -0.75), 0.0)
    return w


@triton.jit
def reach(n_in, N_OUT: tl.constexpr, KIND: tl.constexpr):
    """Half width of the kernel, in units of 1 / (2 * N_OUT) input pixels."""
    stretched = tl.maximum(n_in, N_OUT) if KIND <= 1 else n_in * 0 + N_OUT
    return stretched * (2 + 2 * (KIND % 2))


@triton.jit
def tap_range(first, last, n_from, n_to, width):
    """[lo, hi) of the `n_from` positions that the `n_to` positions first..last may touch; a little too wide, not clipped."""
    lo = ((2 * first + 1) * n_from - width) // (2 * n_to) - 1
    hi = ((2 * last + 1) * n_from + width) // (2 * n_to) + 2
    return lo, hi


@triton.jit
def crop_range(first, last, n_in, N_OUT: tl.constexpr, pad, extent, KIND: tl.constexpr):
    """Crop positions [lo, hi) that outputs first..last touch, of a crop of `extent` at `pad` on a canvas of n_in."""
    lo, hi = tap_range(first, tl.minimum(last, N_OUT - 1), n_in, N_OUT, reach(n_in, N_OUT, KIND))
    return tl.maximum(lo - pad, 0), tl.minimum(hi - pad, extent)


@triton.jit
def place(boxes, index, table, n_images, batch_h, batch_w, margin, v, RAGGED: tl.constexpr, SQUARE: tl.constexpr):
    """Margin, rounding and clip of one box: (valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y) as int32 scalars."""
    b = tl.load(index + v)
    known = (b >= 0) & (b < n_images)
    if RAGGED:
        image_h = tl.load(table + b * 6 + 1, mask=known, other=0).to(tl.float32)
        image_w = tl.load(table + b * 6 + 2, mask=known, other=0).to(tl.float32)
    else:
        image_h = tl.cast(batch_h, tl.float32)
        image_w = tl.cast(batch_w, tl.float32)
    bx0, by0 = tl.load(boxes + v * 4), tl.load(boxes + v * 4 + 1)
    bx1, by1 = tl.load(boxes + v * 4 + 2), tl.load(boxes + v * 4 + 3)
    limit = 1073741824.0
    # A comparison with NaN is false, so this also finds NaN.
    finite = (tl.abs(bx0) < float("inf")) & (tl.abs(by0) < float("inf"))
    finite = finite & (tl.abs(bx1) < float("inf")) & (tl.abs(by1) < float("inf"))
    usable = finite & known
    bx0 = tl.minimum(tl.maximum(tl.where(usable, bx0, 0.0), -limit), limit)
    by0 = tl.minimum(tl.maximum(tl.where(usable, by0, 0.0), -limit), limit)
    bx1 = tl.minimum(tl.maximum(tl.where(usable, bx1, 0.0), -limit), limit)
    by1 = tl.minimum(tl.maximum(tl.where(usable, by1, 0.0), -limit), limit)
    grow_x, grow_y = margin * (bx1 - bx0), margin * (by1 - by0)
    x0 = tl.minimum(tl.maximum(tl.floor(bx0 - grow_x), 0.0), image_w).to(tl.int32)
    y0 = tl.minimum(tl.maximum(tl.floor(by0 - grow_y), 0.0), image_h).to(tl.int32)
    w = tl.minimum(tl.maximum(tl.ceil(bx1 + grow_x), 0.0), image_w).to(tl.int32) - x0
    h = tl.minimum(tl.maximum(tl.ceil(by1 + grow_y), 0.0), image_h).to(tl.int32) - y0
    valid = usable & (bx1 > bx0) & (by1 > by0) & (w > 0) & (h > 0)
    # An invalid view is an empty crop on a canvas of one pixel: the loops do not run and fill is stored.
    w = tl.where(valid, w, 0)
    h = tl.where(valid, h, 0)
    side = tl.maximum(w, h)
    canvas_w = tl.maximum(side if SQUARE else w, 1)
    canvas_h = tl.maximum(side if SQUARE else h, 1)
    pad_x = tl.where(valid, (canvas_w - w) // 2, 0)
    pad_y = tl.where(valid, (canvas_h - h) // 2, 0)
    return valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y


@triton.jit
def store_place(geometry, valid_out, v, valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y):
    """Write one view's placement and validity."""
    g = geometry + v * 8
    tl.store(g, x0)
    tl.store(g + 1, y0)
    tl.store(g + 2, w)
    tl.store(g + 3, h)
    tl.store(g + 4, canvas_w)
    tl.store(g + 5, canvas_h)
    tl.store(g + 6, pad_x)
    tl.store(g + 7, pad_y)
    tl.store(valid_out + v, valid.to(tl.uint8))


@triton.jit
def load_place(geometry, v):
    """Read one view's placement."""
    g = geometry + v * 8
    x0, y0, w, h = tl.load(g), tl.load(g + 1), tl.load(g + 2), tl.load(g + 3)
    return x0, y0, w, h, tl.load(g + 4), tl.load(g + 5), tl.load(g + 6), tl.load(g + 7)


@triton.jit
def axis_norm(norm, n_in, N_OUT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Store 1 / sum of the weights of every output of one axis."""
    width = reach(n_in, N_OUT, KIND)
    for start in range(0, N_OUT, BLOCK):
        i = start + tl.arange(0, BLOCK)
        first, _ = tap_range(i, i, n_in, N_OUT, width)
        total = tl.zeros([BLOCK], tl.float32)
        for k in range(0, width // N_OUT + 4):
            j = first + k
            total += tl.where((j >= 0) & (j < n_in), weight(i, j, n_in, N_OUT, KIND), 0.0)
        tl.store(norm + i, 1.0 / tl.where(i < N_OUT, total, 1.0), mask=i < N_OUT)


@triton.jit(do_not_specialize=["n_images", "batch_h", "batch_w"])
def prepare(
    boxes, index, table, n_images, batch_h, batch_w, margin, geometry, valid_out, norm,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, KIND: tl.constexpr, RAGGED: tl.constexpr, SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a view: placement, validity, and the norms [OUT_H + OUT_W] of both axes."""
    v = tl.program_id(0).to(tl.int64)
    valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = place(
        boxes, index, table, n_images, batch_h, batch_w, margin, v, RAGGED, SQUARE
    )
    store_place(geometry, valid_out, v, valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y)
    norm += v * (OUT_H + OUT_W)
    if KIND <= 1:
        axis_norm(norm, canvas_h, OUT_H, KIND, BLOCK)
        axis_norm(norm + OUT_H, canvas_w, OUT_W, KIND, BLOCK)

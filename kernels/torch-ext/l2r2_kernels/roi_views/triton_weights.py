"""Resampling weights in registers, and the norms of every output.

Distances are kept as integers: output i and input j are `|(2i+1) * n_in - (2j+1) * n_out| / (2 * n_out)` pixels apart, exactly,
so float32 weights are not affected by large coordinates. Sizes are limited to keep these products in 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How a weight is computed from the distance (the constexpr KIND).
KINDS = {("bilinear", True): 0, ("bicubic", True): 1, ("bilinear", False): 2, ("bicubic", False): 3}


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

"""Read runs of bytes as aligned 32-bit words, for the pixels and masks of the kernels for uint8 images.

A lane needs the bytes `off .. off + N - 1` of a row, at any alignment. It loads the words that contain them, each of which
includes at least one of these bytes (so only the rest of the first and last word is read outside the image's memory), and a
funnel shift aligns the bytes of two neighboring words.

`ASM` chooses single instructions (shf, prmt) over arithmetic that also runs in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def funnel(low, high, off, ASM: tl.constexpr):
    """The 4 bytes from byte `off` mod 4 of the words low, high on."""
    if ASM:
        return tl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, off << 3], tl.uint32, True, 1)
    both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    return (both >> ((off & 3) << 3).to(tl.uint64)).to(tl.uint32)


@triton.jit
def load_word(words, i):
    """Words at the places i of a [columns, rows] tile, with the lanes of a warp side by side along the columns.

    If nothing is known about the addresses, the order of the lanes depends on the compiler version. The hint fixes it; since the
    alignment of the words is not known, it cannot widen the loads.
    """
    return tl.load(tl.max_contiguous(words + i, [2, 1]))


@triton.jit
def next_word(words, off, word, i: tl.constexpr, N: tl.constexpr):
    """Word i + 1 of a run of N bytes from byte `off` on; `word`, its word i, where no byte of the run lies in another."""
    if i == (N + 2) // 4:  # the last word at any alignment
        return word
    if i + 1 == (N + 2) // 4 and N % 4 != 1:  # at some alignments the run ends before this word: stay in its last one
        return load_word(words, (off + (N - 1)) >> 2)
    return load_word(words, (off >> 2) + (i + 1))


@triton.jit
def byte_level(four, k: tl.constexpr):
    """Byte k of a word as int32."""
    return ((four >> (8 * k)) & 255).to(tl.int32)


@triton.jit
def byte_float(four, k: tl.constexpr, bias, BIASED: tl.constexpr, ASM: tl.constexpr):
    """Byte k of a word as float32; plus 32768 if BIASED, which takes one byte-permute and no conversion.

    bias: the bits of 32768 as uint32, see triton_place.BIAS.
    """
    if not BIASED:
        return byte_level(four, k).to(tl.float32)
    if not ASM:
        return ((byte_level(four, k) << 8).to(tl.uint32) | bias).to(tl.float32, bitcast=True)
    if k == 0:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7604;", "=r,r,r", [four, bias], tl.uint32, True, 1)
    elif k == 1:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7614;", "=r,r,r", [four, bias], tl.uint32, True, 1)
    elif k == 2:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7624;", "=r,r,r", [four, bias], tl.uint32, True, 1)
    else:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7634;", "=r,r,r", [four, bias], tl.uint32, True, 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mask_place(mask_table, v, y0, x0):
    """(address of the mask's byte at the crop's first pixel, row step, rows and columns that the mask has from there on).

    A view without a mask has zero rows and columns, so all its pixels are kept, as are the pixels beyond any mask.
    """
    entry = mask_table + v * 4
    step = tl.load(entry + 3)
    start = tl.load(entry) + y0.to(tl.int64) * step + x0
    return start, step, tl.load(entry + 1).to(tl.int32) - y0, tl.load(entry + 2).to(tl.int32) - x0


@triton.jit
def kept_bits(start, step, rows, columns, y, x, T: tl.constexpr, ASM: tl.constexpr):
    """int32 of the broadcast shape of y and x: bit k says whether a mask keeps the crop's pixel (y, x + k), k < T."""
    inside = (y < rows) & (x < columns)
    aligned = (start >> 2) << 2
    words = aligned.to(tl.pointer_type(tl.uint32))
    off = tl.where(inside, y * step.to(tl.int32) + x + (start - aligned).to(tl.int32), 0)
    first = off >> 2
    last = (off + tl.minimum(T, tl.maximum(columns - x, 1)) - 1) >> 2  # the last word that holds a byte of the mask
    word = tl.load(tl.max_contiguous(words + first, [2, 1]), mask=inside, other=0xFFFFFFFF)  # see load_word
    bits = off * 0
    for i in tl.static_range((T + 3) // 4):
        after = word
        if i < (T + 2) // 4:
            there = tl.max_contiguous(words + (first + (i + 1)), [2, 1])
            after = tl.load(there, mask=inside & (first + (i + 1) <= last), other=0xFFFFFFFF)
        four = funnel(word, after, off, ASM)
        for k in tl.static_range(4):
            if 4 * i + k < T:
                kept = (byte_level(four, k) != 0) | (inside == 0) | (x + (4 * i + k) >= columns)
                bits |= kept.to(tl.int32) << (4 * i + k)
        word = after
    return bits

"""The small kernel that computes the placement of every view and the addresses of its pixels: one record per view."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_weights import axis_norm

# int64 fields of a record: x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y (see reference.Geometry), the address of the crop's
# first pixel, steps from row to row, channel to channel and pixel to pixel (in elements), how many columns may be read from the
# crop's first on, and BIAS.
RECORD = tl.constexpr(14)
# The float32 bits of 32768, into which a byte-permute inserts a level (see triton_words). They are read from memory, since the
# assembler would rebuild a constant for every permute.
BIAS = tl.constexpr(0x47000000)


@triton.jit
def place(boxes, index, table, n_images, batch_h, batch_w, margin, v, RAGGED: tl.constexpr, SQUARE: tl.constexpr):
    """Margin, rounding and clip of one box: (valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y) as int32 scalars."""
    b = tl.load(index + v)
    known = (b >= 0) & (b < n_images)
    if RAGGED:
        image_h = tl.load(table + b * RAGGED + 1, mask=known, other=0).to(tl.float32)
        image_w = tl.load(table + b * RAGGED + 2, mask=known, other=0).to(tl.float32)
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
def store_record(
    record, valid_out, images, index, table, stride_b, stride_c, stride_y, stride_x, columns, v,
    valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y, RAGGED: tl.constexpr,
):  # fmt: skip
    """Write one view's record and validity. RAGGED: int64 per row of the table, 0 for a batch."""
    size: tl.constexpr = images.dtype.element_ty.primitive_bitwidth // 8
    b = tl.where(valid, tl.load(index + v), 0)  # an invalid view may have no image
    row = table + b * RAGGED
    if RAGGED == 6:  # see source.from_list
        start = tl.load(row)
        stride_c, stride_y = tl.load(row + 3), tl.load(row + 4)
        stride_x = tl.where(stride_c == 1, 3, 1).to(tl.int64)
        columns = tl.load(row + 5)
    elif RAGGED == 3:  # see source.RaggedImages
        start = images.to(tl.int64) + tl.load(row)
        width = tl.load(row + 2)
        stride_c, stride_y, stride_x = width * 0 + 1, 3 * width, width * 0 + 3
        columns = tl.maximum(width, 16)
    else:
        start = images.to(tl.int64) + b * stride_b * size
    start += (y0.to(tl.int64) * stride_y + x0.to(tl.int64) * stride_x) * size
    r = record + v * RECORD
    tl.store(r, x0.to(tl.int64))
    tl.store(r + 1, y0.to(tl.int64))
    tl.store(r + 2, w.to(tl.int64))
    tl.store(r + 3, h.to(tl.int64))
    tl.store(r + 4, canvas_w.to(tl.int64))
    tl.store(r + 5, canvas_h.to(tl.int64))
    tl.store(r + 6, pad_x.to(tl.int64))
    tl.store(r + 7, pad_y.to(tl.int64))
    tl.store(r + 8, start)
    tl.store(r + 9, tl.cast(stride_y, tl.int64))
    tl.store(r + 10, tl.cast(stride_c, tl.int64))
    tl.store(r + 11, tl.cast(stride_x, tl.int64))
    tl.store(r + 12, tl.cast(columns, tl.int64) - x0)
    tl.store(r + 13, x0.to(tl.int64) * 0 + BIAS)
    tl.store(valid_out + v, valid.to(tl.uint8))


@triton.jit
def load_place(record, v):
    """(x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y) of one view, int32."""
    r = record + v * RECORD
    x0, y0 = tl.load(r).to(tl.int32), tl.load(r + 1).to(tl.int32)
    w, h = tl.load(r + 2).to(tl.int32), tl.load(r + 3).to(tl.int32)
    canvas_w, canvas_h = tl.load(r + 4).to(tl.int32), tl.load(r + 5).to(tl.int32)
    return x0, y0, w, h, canvas_w, canvas_h, tl.load(r + 6).to(tl.int32), tl.load(r + 7).to(tl.int32)


@triton.jit
def load_steps(record, v):
    """Address of the crop's first pixel, and the steps from row to row, channel to channel and pixel to pixel, int64."""
    r = record + v * RECORD + 8
    return tl.load(r), tl.load(r + 1), tl.load(r + 2), tl.load(r + 3)


# Image sizes and strides change with every batch: not specializing on them avoids recompilation.
@triton.jit(do_not_specialize=["n_images", "batch_h", "batch_w", "columns", "stride_b", "stride_c", "stride_y", "stride_x"])
def prepare(
    boxes, index, images, table, n_images, batch_h, batch_w, columns, stride_b, stride_c, stride_y, stride_x, margin,
    record, valid_out, norm,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, KIND: tl.constexpr, RAGGED: tl.constexpr, SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per view: its record, validity, and the norms [OUT_H + OUT_W] of both axes."""
    v = tl.program_id(0).to(tl.int64)
    valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y = place(
        boxes, index, table, n_images, batch_h, batch_w, margin, v, RAGGED, SQUARE
    )
    store_record(
        record, valid_out, images, index, table, stride_b, stride_c, stride_y, stride_x, columns, v,
        valid, x0, y0, w, h, canvas_w, canvas_h, pad_x, pad_y, RAGGED,
    )  # fmt: skip
    norm += v * (OUT_H + OUT_W)
    if KIND <= 1:
        axis_norm(norm, canvas_h, OUT_H, KIND, BLOCK)
        axis_norm(norm + OUT_H, canvas_w, OUT_W, KIND, BLOCK)

"""How the kernels address the pixels of a call: a batch by strides, or a table with one row per image.

For a list of hundreds of images, the table derived from their shapes and strides is cached for similar batches, and only the
addresses are updated. `RaggedImages` has its table on the device from the start, so that a call costs the same for any number.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

READABLE = 16  # columns that a window of the kernels may read; narrower images are copied into rows of this width
ROW = 6  # int64 of a table row: address, height, width, steps from channel to channel and row to row, columns that may be read


class RaggedImages(NamedTuple):
    """uint8 images of any sizes in one buffer, as a decoder writes them; `roi_views` takes them without a loop over images.

    Args:
        pixels: uint8 ``[bytes]``, the images one after another, each ``[H, W, 3]`` contiguous; followed by at least 48
            readable bytes.
        places: int64 ``[B, 3]`` on the device of `pixels`: offset of the image's first byte, height, width. It is not
            checked that the images are inside the buffer, because this would stall the stream.
        max_height, max_width: upper bounds of the sizes, known to the host.
    """

    pixels: Tensor
    places: Tensor
    max_height: int
    max_width: int

    @staticmethod
    def pack(images: Sequence[Tensor]) -> RaggedImages:
        """Copy a list of uint8 images ``[H, W, 3]`` or ``[3, H, W]`` into one buffer.

        >>> RaggedImages.pack([torch.zeros(4, 5, 3, dtype=torch.uint8), torch.zeros(3, 2, 7, dtype=torch.uint8)]).places.tolist()
        [[0, 4, 5], [60, 2, 7]]
        """
        packed = [image.permute(1, 2, 0) if image.shape[0] == 3 else image for image in images]
        device = packed[0].device if packed else torch.device("cpu")
        slack = torch.zeros(3 * READABLE, dtype=torch.uint8, device=device)
        pixels = torch.cat([*(image.reshape(-1) for image in packed), slack])
        starts = accumulate((image.numel() for image in packed), initial=0)
        places = [[start, *image.shape[:2]] for start, image in zip(starts, packed)]
        heights, widths = zip(*(image.shape[:2] for image in packed)) if packed else ((0,), (0,))
        table = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 3)
        return RaggedImages(pixels, table, max(heights), max(widths))

    def images(self) -> list[Tensor]:
        """The images as views ``[H, W, 3]`` of the buffer; waits for the device."""
        return [self.pixels[start : start + 3 * h * w].view(h, w, 3) for start, h, w in self.places.tolist()]


class Source(NamedTuple):
    """What the launchers need to know about the pixels.

    pixels: a tensor of their dtype, the batch itself if not ragged. images: their number. ragged: int64 per row of the table
    [B, ragged] on the device, 0 for a batch.
    size: (height, width, columns that may be read) and strides: (image, channel, row, pixel), of a batch.
    largest: no image is (higher, wider). span: elements that the pixels of a tile's rows may lie apart, at most.
    layouts: steps from pixel to pixel that occur. held: copies that must stay alive until the kernels are queued.
    """

    pixels: Tensor
    table: Tensor
    ragged: int
    images: int
    size: tuple[int, int, int]
    strides: tuple[int, int, int, int]
    largest: tuple[int, int]
    span: int
    layouts: tuple[int, ...]
    held: tuple[Tensor, ...]

    def canvas(self, square: bool) -> tuple[int, int]:
        """The largest (height, width) a canvas can have."""
        side = max(self.largest)
        return (side, side) if square else self.largest


class _Known(NamedTuple):
    """The information in the shapes and strides of a list of images: the table without addresses, and the images to copy."""

    table: array[int]
    largest: tuple[int, int]
    span: int
    layouts: tuple[int, ...]
    copied: tuple[int, ...]


def _layout(step_c: int) -> int:
    """Step from pixel to pixel: 3 for packed images, 1 for planes. The kernels follow the same rule."""
    return 3 if step_c == 1 else 1


def _regular(width: int, step_c: int, step_x: int) -> bool:
    """Whether pixels lie as the uint8 kernels read them, packed or in planes, in rows long enough for a window."""
    return width >= READABLE and step_x == _layout(step_c)


def _span(step_c: int, step_y: int) -> int:
    return 2 * step_c + 128 * step_y


@lru_cache(maxsize=4096)
def _row(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """An image's table row without the address; None if its shape is wrong."""
    if len(shape) != 3 or (shape[0] != 3 and shape[2] != 3):
        return None
    y, x, c = (1, 2, 0) if shape[0] == 3 else (0, 1, 2)
    if _regular(shape[x], stride[c], stride[x]):
        return shape[y], shape[x], stride[c], stride[y], shape[x]
    columns = max(shape[x], READABLE)
    return shape[y], shape[x], 1, 3 * columns, columns  # of its copy


def _copy(image: Tensor) -> Tensor:
    """An image in packed rows that the kernels can read."""
    packed = image.permute(1, 2, 0) if image.shape[0] == 3 else image
    return F.pad(packed, (0, 0, 0, max(packed.shape[1], READABLE) - packed.shape[1])).contiguous()


@lru_cache(maxsize=16)
def _known(shapes: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...]) -> _Known | None:
    """Return the information in these shapes and strides; None if one of them is not an image."""
    rows = list(map(_row, shapes, strides))
    columns = [] if None in rows else list(zip(*rows))
    if not columns:
        return None
    table = array("q", bytes(8 * ROW * len(rows)))
    for k, column in enumerate(columns):
        table[k + 1 :: ROW] = array("q", column)
    heights, widths, steps_c, steps_y, _ = columns
    copied = []
    for i, (shape, stride) in enumerate(zip(shapes, strides)):
        x, c = (2, 0) if shape[0] == 3 else (1, 2)
        if not _regular(shape[x], stride[c], stride[x]):
            copied.append(i)
    layouts = tuple(sorted(set(map(_layout, steps_c))))
    span = max(map(_span, steps_c, steps_y))
    return _Known(table, (max(heights), max(widths)), span, layouts, tuple(copied))


def from_list(images: Sequence[Tensor]) -> Source | None:
    """The source of a list of uint8 images on one device, in one pass; None if anything about them is wrong or unusual."""
    if not len(images) or set(map(type, images)) != {Tensor} or {image.dtype for image in images} != {torch.uint8}:
        return None
    if len(set(map(Tensor.get_device, images))) != 1:
        return None
    known = _known(tuple([image.shape for image in images]), tuple([image.stride() for image in images]))
    if known is None:
        return None
    held: list[Tensor] = []
    if known.copied:
        images = list(images)
        for i in known.copied:
            images[i] = _copy(images[i])
            held.append(images[i])
    table = known.table[:]
    table[::ROW] = array("q", map(Tensor.data_ptr, images))
    return Source(
        images[0], _to_device(table, images[0].device), ROW, len(images), (0, 0, 0), (0, 0, 0, 0),
        known.largest, known.span, known.layouts, tuple(held),
    )  # fmt: skip


def from_batch(batch: Tensor) -> Source:
    """The source of a batch [B, 3, H, W]."""
    height, width = batch.shape[2:]
    columns, whole = width, batch
    if batch.dtype == torch.uint8 and not _regular(width, batch.stride(1), batch.stride(3)):
        columns = max(width, READABLE)
        whole = F.pad(batch, (0, columns - width)).contiguous()
    image, channel, row, pixel = whole.stride()
    empty = torch.empty(0, dtype=torch.int64, device=batch.device)
    span = _span(channel, row) if batch.dtype == torch.uint8 else 128 * max(row, pixel)
    return Source(
        whole, empty, 0, batch.shape[0], (height, width, columns), (image, channel, row, pixel), (height, width), span,
        (_layout(channel),), (whole,),
    )  # fmt: skip


def from_ragged(images: RaggedImages) -> Source:
    """The source of images in one buffer."""
    return Source(
        images.pixels, images.places.contiguous(), 3, images.places.shape[0], (0, 0, 0), (0, 0, 0, 0),
        (images.max_height, images.max_width), _span(1, 3 * images.max_width), (3,), (),
    )  # fmt: skip


def mask_table(
    masks: Sequence[Tensor], mask_views: Sequence[int], views: int, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """(int64 [views, 4] of address, height, width and row step, zeros without a mask; the masks in rows of bytes)."""
    if not masks:
        return torch.empty(0, dtype=torch.int64, device=device), []
    masks = [mask if mask.stride(1) == 1 else mask.contiguous() for mask in masks]
    table = array("q", bytes(8 * 4 * views))
    for view, mask in zip(mask_views[1:], masks):
        table[4 * view : 4 * view + 4] = array("q", (mask.data_ptr(), *mask.shape, mask.stride(0)))
    return _to_device(table, device, 4), masks


def _to_device(table: array[int], device: torch.device, columns: int = ROW) -> Tensor:
    """An int64 table on the device, copied through pinned memory so that the host does not wait."""
    tensor = torch.frombuffer(table, dtype=torch.int64).view(-1, columns)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

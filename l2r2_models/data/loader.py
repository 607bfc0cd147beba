"""The loader of training batches, which can cut the views on the device that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..views import Patches, pad_alike
from .dataset import Uncut, ViewDataset

UNCUT = ("uncut", "swapped_uncut")


class ViewLoader(DataLoader[Any]):
    """A DataLoader for a `ViewDataset`; with `cut=False`, workers decode and augment, and the views are cut on a device.

    The batches are the same, up to rounding. Whole augmented images travel from the workers to the device, as 8-bit pixels: fewer
    bytes than float views if the images are small, or reduced in decoding, and more otherwise.

    Args:
        rows: the data set.
        device: device to cut on.
        options: other arguments of `DataLoader`.

    >>> loader = ViewLoader(rows, device="cuda", batch_size=32, num_workers=8, pin_memory=True)  # doctest: +SKIP
    >>> next(iter(loader))["fg"].device  # doctest: +SKIP
    device(type='cuda', index=0)
    """

    dataset: ViewDataset

    def __init__(self, rows: ViewDataset, *, device: torch.device | str, **options: Any) -> None:
        super().__init__(rows, collate_fn=collate, **options)
        self.device = device

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            for key in UNCUT:
                if key in batch:
                    rows = _unpacked(batch.pop(key), self.device)
                    batch |= self.dataset.views_of(rows, swapped=key != "uncut", device=self.device)
            yield batch


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items of a `ViewDataset`: `default_collate`, where views may have several sizes (`views.pad_alike`).

    Pixels and masks of items that are not cut differ in size; they are packed into one tensor.
    """
    uncut = {key: _packed([item[key] for item in items]) for key in UNCUT if key in items[0]}
    views = {key for key, value in items[0].items() if isinstance(value, Tensor) and value.ndim == 3}
    alike = {key: pad_alike([item[key] for item in items]) for key in views}
    rest = [
        {key: alike[key][i] if key in alike else v for key, v in item.items() if key not in uncut} for i, item in enumerate(items)
    ]
    return {**default_collate(rest), **uncut}


def _packed(rows: Sequence[Uncut]) -> dict[str, Any]:
    """Pack rows into few tensors, because each tensor that a worker sends takes a file descriptor."""
    sizes, parts, masks = [], [], []
    for pixels, _, mask in rows:
        sizes.append(pixels.size if isinstance(pixels, Patches) else None)
        parts.append(list(pixels.parts.items()) if isinstance(pixels, Patches) else [((), pixels)])
        masks.append(mask)
    tensors = [part for of_row in parts for _, part in of_row] + [mask for mask in masks if mask is not None]
    return {
        "bytes": torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors]),
        "boxes": torch.stack([row.box for row in rows]),
        "sizes": sizes,
        "parts": [[(list(window), list(part.shape)) for window, part in of_row] for of_row in parts],
        "masks": [None if mask is None else list(mask.shape) for mask in masks],
    }


def _unpacked(packed: dict[str, Any], device: torch.device | str) -> list[Uncut]:
    """Return the rows, with pixels and masks on a device; from pinned memory, a GPU copies while others compute."""
    data = packed["bytes"].to(device, non_blocking=torch.device(device).type == "cuda")
    place = 0

    def next_of(shape: Sequence[int]) -> Tensor:
        nonlocal place
        count = torch.Size(shape).numel()
        place += count
        part: Tensor = data[place - count : place].view(*shape)
        return part

    pixels: list[Tensor | Patches] = []
    for size, parts in zip(packed["sizes"], packed["parts"]):
        found = {tuple(window): next_of(shape) for window, shape in parts}
        pixels.append(found[()] if size is None else Patches((size[0], size[1]), found))
    masks = [None if shape is None else next_of(shape).bool() for shape in packed["masks"]]
    return [Uncut(*row) for row in zip(pixels, packed["boxes"], masks)]

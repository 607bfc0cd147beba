"""The loader of training batches, which cuts the views on the device that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from ..views import pad_alike
from .dataset import Uncut, ViewDataset

UNCUT = ("uncut", "swapped_uncut")


class ViewLoader(DataLoader[Any]):
    """A DataLoader for a `ViewDataset` with `cut=False`: its workers decode and augment, and the views are cut on a device.

    The batches are those of the same data set with `cut=True`, up to rounding. Only 8-bit pixels travel from the workers to the
    device, which are fewer bytes than float views, and the workers have less to do.

    Args:
        rows: the data set.
        device: device to cut on.
        options: other arguments of `DataLoader`.

    >>> loader = ViewLoader(rows, device="cuda", batch_size=32, num_workers=8, pin_memory=True)  # doctest: +SKIP
    >>> next(iter(loader))["fg"].device  # doctest: +SKIP
    device(type='cuda', index=0)
    """

    def __init__(self, rows: ViewDataset, *, device: torch.device | str, **options: Any) -> None:
        super().__init__(rows, collate_fn=collate, **options)
        self.rows, self.device = rows, device

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            for key in UNCUT:
                if key in batch:
                    sent = [_sent(row, self.device) for row in batch.pop(key)]
                    batch |= self.rows.views_of(sent, swapped=key != "uncut", device=self.device)
            yield batch


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items of a `ViewDataset`: `default_collate`, where views may have several sizes (`views.pad_alike`).

    The pixels of items that are not cut stay a list.
    """
    uncut = {key: [item[key] for item in items] for key in UNCUT if key in items[0]}
    views = {key for key, value in items[0].items() if isinstance(value, torch.Tensor) and value.ndim == 3}
    alike = {key: pad_alike([item[key] for item in items]) for key in views}
    rest = [
        {key: alike[key][i] if key in alike else v for key, v in item.items() if key not in uncut} for i, item in enumerate(items)
    ]
    return {**default_collate(rest), **uncut}


def _sent(row: Uncut, device: torch.device | str) -> Uncut:
    """Start copying to the device; copies from pinned memory are asynchronous."""
    pixels, box, mask = row
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.to(device, non_blocking=True)
    return Uncut(pixels, box, None if mask is None else mask.to(device, non_blocking=True))

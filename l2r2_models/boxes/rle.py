"""COCO's run-length encoding of masks: column-major runs, zeros first, as a list of lengths or a compressed string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import L2R2Error


@dataclass(frozen=True)
class Rle:
    """A run-length encoded mask.

    Attributes:
        size: `(height, width)`.
        counts: COCO's compressed string.

    >>> mask = torch.eye(3, dtype=torch.bool)
    >>> torch.equal(Rle.encode(mask).decode(), mask)
    True
    """

    size: tuple[int, int]
    counts: str

    @classmethod
    def encode(cls, mask: Tensor) -> Rle:
        """Encode a mask `[H, W]` bool."""
        flat = mask.cpu().numpy().astype(bool).ravel(order="F")
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        lengths = np.diff([0, *changes.tolist(), flat.size]).tolist()
        return cls((mask.shape[0], mask.shape[1]), _compress([0, *lengths] if flat[:1].any() else lengths))

    @classmethod
    def from_coco(cls, data: Any) -> Rle:
        """Create a mask from COCO's `{"size": [H, W], "counts": string or list}`.

        Raises:
            L2R2Error: when the data are not in that form, or the runs do not add up to the size.
        """
        try:
            height, width = (int(side) for side in data["size"])
            counts = data["counts"]
            lengths = _decompress(counts) if isinstance(counts, str) else [int(c) for c in counts]
        except (TypeError, ValueError, KeyError, IndexError, OverflowError):
            raise L2R2Error("a mask is not COCO RLE; write {size: [height, width], counts: ...}.") from None
        if min(height, width) < 1 or any(c < 0 for c in lengths) or sum(lengths) != height * width:
            raise L2R2Error(f"the runs of a mask do not add up to its {width}x{height} pixels.")
        return cls((height, width), counts if isinstance(counts, str) else _compress(lengths))

    def to_coco(self) -> dict[str, Any]:
        """The mask as COCO stores it in JSON."""
        return {"size": list(self.size), "counts": self.counts}

    def decode(self) -> Tensor:
        """Decode to a mask `[H, W]` bool."""
        lengths = _decompress(self.counts)
        flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return torch.from_numpy(np.ascontiguousarray(flat.reshape(self.size, order="F")))


def _compress(lengths: Sequence[int]) -> str:
    """Encode lengths as COCO does: differences to the run two before, six bits per character, the sign in the last one."""
    out = []
    for i, length in enumerate(lengths):
        value = length - lengths[i - 2] if i > 2 else length
        more = True
        while more:
            part = value & 0x1F
            value >>= 5
            more = value != (-1 if part & 0x10 else 0)
            out.append(chr((part | 0x20 if more else part) + 48))
    return "".join(out)


def _decompress(text: str) -> list[int]:
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        part = ord(character) - 48
        if not 0 <= part < 64:
            raise ValueError(f"character {character!r}")
        value |= (part & 0x1F) << shift
        shift += 5
        if part & 0x20:
            continue
        if part & 0x10:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the string ends inside a number")
    return lengths

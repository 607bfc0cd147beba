"""Rotary position embeddings of kept tokens: the angles are gathered like the tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rotary(NamedTuple):
    """Sines and cosines ``[..., N, h, D]`` of the tokens of one block; h is 1, or the number of heads if each has its own."""

    sin: Tensor
    cos: Tensor

    def at(self, rows: Tensor) -> "Rotary":
        """Return the embeddings of the tokens ``rows [T]``."""
        return Rotary(self.sin.index_select(0, rows), self.cos.index_select(0, rows))

    def rotate(self, x: Tensor, half: bool) -> Tensor:
        """Rotate the channels of x ``[..., N, H, D]``, in pairs of neighbors or, if ``half``, of the two halves."""
        if half:
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return (x * self.cos + turned * self.sin).to(x.dtype)


def rotaries(rope: Tensor, tokens: int, blocks: int) -> list[Rotary]:
    """Make one `Rotary` per block, from timm's embedding of the patches; tokens before them (class, registers) are not rotated.

    rope: sines and cosines side by side, ``[P, 2 D]``, or ``[H, P, 2 D]``, or ``[blocks, H, P, 2 D]``.

    Raises:
        ValueError: when the shape of rope does not match.
    """
    if not 2 <= rope.dim() <= 4 or rope.shape[-2] > tokens or (rope.dim() == 4 and rope.shape[0] != blocks):
        raise ValueError(
            f"rope must be [P, 2 D], [heads, P, 2 D] or [{blocks} blocks, heads, P, 2 D] for P <= {tokens} patches; "
            f"got {list(rope.shape)}."
        )
    sin, cos = rope.chunk(2, -1)
    prefix = (0, 0, tokens - rope.shape[-2], 0)
    sin, cos = F.pad(sin, prefix), F.pad(cos, prefix, value=1.0)
    if rope.dim() == 2:
        return [Rotary(sin[:, None], cos[:, None])] * blocks
    sin, cos = sin.transpose(-3, -2), cos.transpose(-3, -2)  # [..., N, H, D]
    return [Rotary(sin, cos)] * blocks if rope.dim() == 3 else [Rotary(*pair) for pair in zip(sin, cos)]

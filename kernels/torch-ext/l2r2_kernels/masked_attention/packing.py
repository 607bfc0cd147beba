"""Pack the kept tokens of a batch, and unpack them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import take_rows


class Packed(NamedTuple):
    """The kept tokens of B images, concatenated image by image in their original order, with zero padding at the end.

    tokens: ``[T_cap, C]``. cu_seqlens: ``[B + 1]`` int32, image i has the rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.
    max_len: N, the maximum length of an image. source: ``[T_cap]`` int32, the row's position in the flat ``[B * N]`` (-1 for
    padding). inverse: ``[B * N]`` int32, the token's row (-1 if dropped). overflow: a bool tensor of one element, True
    if the capacity was too small; then every packed and unpacked token is NaN. num_prefix: number of first tokens of each image
    that are kept whatever the mask.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_len: int
    source: Tensor
    inverse: Tensor
    overflow: Tensor
    num_prefix: int

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return self.cu_seqlens.shape[0] - 1

    def image_of_token(self) -> Tensor:
        """``[T_cap]`` int64: the image of each row (0 for padding)."""
        return torch.div(self.source.clamp_min(0), max(self.max_len, 1), rounding_mode="floor").long()

    def prefix(self) -> Tensor:
        """The prefix tokens (class, registers) of each image, ``[B, num_prefix, C]``."""
        rows = self.cu_seqlens[:-1, None] + torch.arange(self.num_prefix, device=self.cu_seqlens.device)
        rows = rows.flatten().clamp_max(max(self.tokens.shape[0] - 1, 0))  # out of range only after an overflow
        tokens: Tensor = self.tokens.index_select(0, rows).unflatten(0, (self.batch, self.num_prefix))
        return tokens

    def check(self) -> None:
        """Raise OverflowError if the capacity was too small; synchronizes with the device."""
        if bool(self.overflow):
            raise OverflowError(f"pack: the kept tokens did not fit into {self.tokens.shape[0]} rows; pass a larger capacity.")


def round_capacity(total: int) -> int:
    """Round up to a capacity of at least ``total`` tokens: one of 32 sizes per octave, at most 3 % more, and a multiple of 64.

    A small number of sizes limits the number of compiled graphs and matrix shapes.
    """
    step = max(64, 1 << max(total.bit_length() - 6, 0))
    return -(-total // step) * step


def pack(x: Tensor, mask: Tensor, *, num_prefix: int = 0, capacity: int | str | None = None) -> Packed:
    """Drop the masked tokens of a batch.

    Args:
        x: ``[B, N, C]`` floating tokens, prefix tokens (class, registers) first.
        mask: ``[B, N]`` bool, True = kept. May stay on the CPU when x does not.
        num_prefix: number of first tokens that are kept whatever the mask.
        capacity: rows of the result.
            An int, if a bound is known without a synchronization: from boxes, from masks on the CPU, from a fixed
            coverage (``round_capacity`` helps). Needed for a mask on a GPU and inside ``torch.compile(fullgraph=True)``.
            None: counted from a mask on the CPU; rounded up by ``round_capacity`` when x is on a GPU.
            "sync": counted from the mask on any device, which makes the host wait for the GPU once.
            None with a mask on a GPU is an error: B * N rows would be correct, but save nothing.

    Returns:
        ``Packed``. With an int capacity the kept tokens may not fit. With the mask on the CPU this raises; on a GPU,
        where checking would synchronize, all tokens become NaN and ``packed.overflow`` is True (``packed.check()`` raises).

    Raises:
        ValueError: when an argument does not match; the message names it.

    Differentiable in x: dropped tokens get a zero gradient, and no atomics are used.
    """
    check_tokens(x, mask, num_prefix)
    _check_capacity(mask, capacity)
    batch, tokens, channels = x.shape
    rows = _capacity(x, mask, num_prefix, capacity)
    keep = mask.to(x.device, non_blocking=True)
    if num_prefix:
        keep = keep | (torch.arange(tokens, device=x.device) < num_prefix)
    ends = keep.flatten().cumsum(0)  # [B * N], kept tokens so far
    row = torch.arange(1, rows + 1, device=x.device)
    index = torch.searchsorted(ends, row)  # the row-th kept token; B * N when there are fewer
    index = torch.where(index < batch * tokens, index, -1)
    inverse = torch.where(keep.flatten(), ends - 1, -1)
    cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0))
    overflow = cu_seqlens[-1] > rows
    index, inverse = (torch.where(overflow, -2, i).to(torch.int32) for i in (index, inverse))
    cu_seqlens = cu_seqlens.clamp_max(rows).to(torch.int32)
    packed = take_rows(x.reshape(batch * tokens, channels), index, inverse, 0.0)
    return Packed(packed, cu_seqlens, tokens, index, inverse, overflow, num_prefix)


def unpack(packed: Packed, fill: float = 0.0) -> Tensor:
    """Return the tokens ``[B, N, C]`` at their original positions, ``fill`` for dropped ones; differentiable."""
    flat = take_rows(packed.tokens, packed.inverse, packed.source, float(fill))
    tokens: Tensor = flat.unflatten(0, (packed.batch, packed.max_len))
    return tokens


def check_tokens(x: Tensor, mask: Tensor, num_prefix: int) -> None:
    """Raise a ValueError that names the argument that does not match."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a floating tensor [B, N, C]; got {x.dtype} {list(x.shape)}.")
    if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor [B, N] = {list(x.shape[:2])}; got {mask.dtype} {list(mask.shape)}.")
    if not 0 <= num_prefix <= x.shape[1]:
        raise ValueError(f"num_prefix must be between 0 and the {x.shape[1]} tokens of an image; got {num_prefix}.")


def _check_capacity(mask: Tensor, capacity: int | str | None) -> None:
    if isinstance(capacity, (str, float)):
        if capacity != "sync":
            raise ValueError(f'capacity must be a number of tokens, None or "sync"; got {capacity!r}.')
    elif capacity is not None and capacity < 0:
        raise ValueError(f"capacity must not be negative; got {capacity}.")
    elif capacity is None and mask.device.type != "cpu":
        raise ValueError(
            "capacity is needed for a mask on a GPU, because counting its tokens would synchronize: "
            'pass a bound, a mask on the CPU, or capacity="sync".'
        )


def _capacity(x: Tensor, mask: Tensor, num_prefix: int, capacity: int | str | None) -> int:
    if capacity is None or isinstance(capacity, str):
        total = _total(mask, num_prefix)
        return total if x.device.type == "cpu" else round_capacity(total)
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        total = _total(mask, num_prefix)
        if total > capacity:
            raise ValueError(f"capacity is {capacity}, but the mask keeps {total} tokens; pass at least that many.")
    return capacity


def _total(mask: Tensor, num_prefix: int) -> int:
    return int(mask[:, num_prefix:].sum()) + num_prefix * mask.shape[0]

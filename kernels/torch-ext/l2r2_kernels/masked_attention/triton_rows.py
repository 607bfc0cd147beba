"""Two small kernels: the index of kept keys, and gathering rows by an index."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import on_device


@triton.jit(do_not_specialize=["N"])
def key_index_kernel(MASK, INDEX, COUNT, N, BLOCK: tl.constexpr):
    """One program per image: each kept token is written to its rank, each dropped one after the kept ones."""
    base = tl.program_id(0).to(tl.int64) * N
    token = tl.arange(0, BLOCK)
    inside = token < N
    kept = tl.load(MASK + base + token, mask=inside, other=0).to(tl.int32)
    rank = tl.cumsum(kept, 0) - kept
    count = tl.sum(kept, 0)
    place = tl.where(kept != 0, rank, count + token - rank)
    tl.store(INDEX + base + place, token, mask=inside)
    tl.store(COUNT + tl.program_id(0), count)


@triton.jit(do_not_specialize=["ROWS"])
def take_rows_kernel(
    SOURCE, INDEX, OUT, fill, stride, ROWS, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Copy the rows of SOURCE that INDEX names; -1 gives a row of ``fill``, -2 one of NaN."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < ROWS)[:, None] & (column < C)[None, :]
    source = tl.load(INDEX + row, mask=row < ROWS, other=-1)
    taken = inside & (source >= 0)[:, None]
    x = tl.load(SOURCE + source.to(tl.int64)[:, None] * stride + column[None, :], mask=taken, other=0.0)
    blank = tl.where(source == -2, float("nan"), fill)
    x = tl.where((source >= 0)[:, None], x.to(tl.float32), blank[:, None])
    tl.store(OUT + row.to(tl.int64)[:, None] * C + column[None, :], x.to(OUT.dtype.element_ty), mask=inside)


def key_index(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.key_index_reference``, in one launch."""
    batch, tokens = key_mask.shape
    index = key_mask.new_empty(batch, tokens, dtype=torch.int32)
    count = key_mask.new_empty(batch, dtype=torch.int32)
    if batch:
        with on_device(key_mask.device):
            block = triton.next_power_of_2(max(tokens, 1))
            key_index_kernel[(batch,)](key_mask.contiguous().view(torch.uint8), index, count, tokens, BLOCK=block, num_warps=4)
    return index, count


def take_rows(source: Tensor, index: Tensor, fill: float) -> Tensor:
    """As ``reference.take_rows_reference``, in one launch, for dtypes that float32 holds exactly."""
    if source.stride(-1) != 1:
        source = source.contiguous()
    rows, columns = index.shape[0], source.shape[1]
    out = source.new_empty(rows, columns)
    if rows and columns:
        grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 256))
        with on_device(source.device):
            take_rows_kernel[grid](
                source, index, out, fill, source.stride(0), rows, columns, BLOCK_R=16, BLOCK_C=256, num_warps=4
            )
    return out

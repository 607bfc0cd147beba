"""Masked and varlen attention in plain PyTorch.

All other implementations in this folder are compared with these functions. They take any float dtype (float64 for the
comparisons), are differentiable, and are written for clarity, not for speed.
"""

from itertools import pairwise

import torch
from torch import Tensor


def masked_attention_reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of all queries over the kept keys.

    q, k, v: ``[B, H, N, D]``; key_mask: ``[B, N]`` bool, True = kept. Returns out ``[B, H, N, D]`` and the natural-log
    sum of exponentials ``[B, H, N]``. For an image without a kept key, out is 0, lse is -inf and the gradients are zero.
    """
    kept = key_mask[:, None, :, None]
    k, v = k.masked_fill(~kept, 0), v.masked_fill(~kept, 0)  # a zero weight alone would not remove NaN
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~key_mask[:, None, None, :], float("-inf"))
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0))
    total = weights.sum(-1, keepdim=True)
    out = weights @ v / total.masked_fill(total == 0, 1)
    return out, (top + total.detach().log()).squeeze(-1)


def varlen_attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention inside each segment ``cu_seqlens[i]:cu_seqlens[i + 1]`` of packed tokens.

    q, k, v: ``[T, H, D]``; cu_seqlens: ``[B + 1]`` integers, rising from 0. Returns out ``[T, H, D]`` and lse ``[H, T]``;
    for tokens past the last segment, out is 0 and lse is -inf.
    """
    bounds = [*cu_seqlens.tolist(), q.shape[0]]
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0)]
    for segment, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        qs, ks, vs = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # [1, H, n, D]
        padding = segment == len(bounds) - 2  # has no keys
        mask = torch.full((1, end - start), not padding, dtype=torch.bool, device=q.device)
        out, lse = masked_attention_reference(qs, ks, vs, mask, scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of ``masked_attention_reference`` by the closed formulas (shapes as there, grad ``[B, H, N, D]``).

    Source: FlashAttention (arXiv 2205.14135), appendix B.2: ``ds = p * (dp - rowsum(grad * out))``.
    """
    kept = key_mask[:, None, :, None]
    k, v = k.masked_fill(~kept, 0), v.masked_fill(~kept, 0)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~key_mask[:, None, None, :], float("-inf"))
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    delta = (grad * out).sum(-1, keepdim=True)
    ds = weights * (grad @ v.transpose(-2, -1) - delta) * scale
    dk = (ds.transpose(-2, -1) @ q).masked_fill(~kept, 0)
    dv = (weights.transpose(-2, -1) @ grad).masked_fill(~kept, 0)
    return ds @ k, dk, dv


def key_index_reference(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept tokens of each image.

    Args:
        key_mask: ``[B, N]`` bool, True for tokens to keep.

    Returns:
        ``index [B, N]`` int32, the indices of the kept tokens of each image in order and then of the dropped ones, and
        ``count [B]`` int32, the number of kept tokens.
    """
    index = torch.argsort(~key_mask, dim=1, stable=True).to(torch.int32)
    return index, key_mask.sum(1, dtype=torch.int32)


def key_mask_of(index: Tensor, count: Tensor) -> Tensor:
    """The ``[B, N]`` bool mask that ``key_index_reference`` was made from."""
    kept = torch.arange(index.shape[1], device=index.device) < count[:, None]
    return torch.zeros_like(kept).scatter_(1, index.long(), kept)


def take_rows_reference(source: Tensor, index: Tensor, fill: float) -> Tensor:
    """Rows of ``source [M, C]`` by ``index [K]``: -1 gives a row of ``fill``, -2 a row of NaN. Returns ``[K, C]``."""
    if source.shape[0] == 0:
        rows = source.new_zeros(index.shape[0], source.shape[1])
    else:
        rows = source.index_select(0, index.clamp_min(0))
    rows = rows.masked_fill((index == -1)[:, None], fill)
    return rows.masked_fill((index == -2)[:, None], float("nan"))


def varlen_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of ``varlen_attention_reference``, ``[T, H, D]`` each."""
    bounds = cu_seqlens.tolist()
    grads = tuple(x.new_zeros(x.shape) for x in (q, k, v))
    for start, end in pairwise(bounds):
        g, qs, ks, vs, o = (x[start:end].transpose(0, 1)[None] for x in (grad, q, k, v, out))
        mask = torch.ones(1, end - start, dtype=torch.bool, device=q.device)
        for whole, part in zip(grads, attention_backward(g, qs, ks, vs, o, lse[None, :, start:end], mask, scale)):
            whole[start:end] = part[0].transpose(0, 1)
    return grads[0], grads[1], grads[2]

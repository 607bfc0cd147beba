"""The public attention functions: check the arguments, then call the operator or PyTorch's attention."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .op import BACKENDS, MAX_HEAD_DIM, key_index, masked_attention_op, runs_triton, varlen_attention_op


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, scale: float | None = None,
    keys: tuple[Tensor, Tensor] | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Softmax attention of all queries over the kept keys of their image.

    Args:
        q, k, v: ``[B, H, N, D]``, one floating dtype (under autocast they are cast to its dtype, as SDPA does).
        key_mask: ``[B, N]`` bool, True = the token is a key. None keeps all.
        scale: factor of the scores; ``D ** -0.5`` by default.
        keys: output of ``key_index(key_mask)``, to share it among blocks with the same mask; computed if not given.
        backend: "auto", "triton" (needs CUDA, or TRITON_INTERPRET=1 on the CPU) or "torch".

    Returns:
        ``[B, H, N, D]``. An image without a kept key has zero output and zero gradients. Masked keys and values, even NaN
        or Inf, affect neither the output nor any gradient; their own gradients are exactly zero. The backward is bitwise
        repeatable with Triton.

    Raises:
        ValueError: when a shape, dtype or device does not match; the message names the argument.

    Source: iFAM's second stage (masked tokens are keys in no block); kernels after FlashAttention-2, arXiv 2307.08691.
    """
    q, k, v = _checked(q, k, v, 4, "[B, H, N, D]")
    _check_backend(backend, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if key_mask.shape != (q.shape[0], q.shape[2]) or key_mask.dtype != torch.bool or key_mask.device != q.device:
        raise ValueError(
            f"key_mask must be a bool tensor [B, N] = {[q.shape[0], q.shape[2]]} on {q.device}; "
            f"got {key_mask.dtype} {list(key_mask.shape)} on {key_mask.device}."
        )
    if keys is not None:
        _check_keys(keys, key_mask)
    if not runs_triton(q, q.shape[-1], backend):
        return _masked_sdpa(q, k, v, key_mask, scale)
    index, count = keys if keys is not None else key_index(key_mask, backend)
    out: Tensor = masked_attention_op(q, k, v, index, count, scale, backend)[0]
    return out


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    dropped = ~key_mask[:, None, :, None]
    empty = ~key_mask.any(1)[:, None]  # NaN in some SDPA backends: attend to all keys instead, then set to zero
    k, v = k.masked_fill(dropped, 0), v.masked_fill(dropped, 0)
    # cuDNN's masked backward gives NaN on Hopper at some lengths (pytorch #196678).
    safe = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(safe) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=(key_mask | empty)[:, None, None, :], scale=scale)
    return out.masked_fill(empty[:, :, None, None], 0)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention inside each segment of packed tokens.

    Args:
        q, k, v: ``[T, H, D]``, one floating dtype (under autocast they are cast to its dtype).
        cu_seqlens: ``[B + 1]`` int32: segment i is the tokens ``cu_seqlens[i]:cu_seqlens[i + 1]``; the first is 0, the
            last at most T. Tokens after it are padding: output 0, gradient 0.
        max_len: an upper bound of the segment lengths, known to the host. On CUDA it only determines the launch: a longer
            segment is still correct, but slow. On the CPU it raises.
        scale, backend: as in ``masked_attention``.

    Returns:
        ``[T, H, D]``. Does not synchronize with the device.

    Raises:
        ValueError: when a shape, dtype or device does not match; the message names the argument.
    """
    q, k, v = _checked(q, k, v, 3, "[T, H, D]")
    _check_backend(backend, q)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens must be an int32 tensor [B + 1] on {q.device}; "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out: Tensor = varlen_attention_op(q, k, v, cu_seqlens, max_len, scale, backend)[0]
    return out


def _checked(q: Tensor, k: Tensor, v: Tensor, dims: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v in one dtype, that of autocast if it is on."""
    if q.dim() != dims or not q.is_floating_point():
        raise ValueError(f"q must be a floating {layout} tensor; got {q.dtype} {list(q.shape)}.")
    if q.shape[-1] == 0 or q.shape[1] == 0:
        raise ValueError(f"q must have at least one head and one channel; got {layout} = {list(q.shape)}.")
    q, k, v = _autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.device != q.device:
            raise ValueError(f"{name} must have q's shape {list(q.shape)} on {q.device}; got {list(x.shape)} on {x.device}.")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}; got {x.dtype}.")
    return q, k, v


def _check_keys(keys: tuple[Tensor, Tensor], key_mask: Tensor) -> None:
    for x, shape in zip(keys, (key_mask.shape, key_mask.shape[:1])):
        if x.shape != shape or x.dtype != torch.int32 or x.device != key_mask.device:
            raise ValueError(f"keys must be the output of key_index(key_mask); got {x.dtype} {list(x.shape)} on {x.device}.")


def _check_backend(backend: str, q: Tensor) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}; choose from {', '.join(BACKENDS)}.")
    if backend == "triton" and (q.shape[-1] > MAX_HEAD_DIM or q.dtype == torch.float64):
        raise ValueError(f"backend 'triton' takes heads up to {MAX_HEAD_DIM} wide and no float64; got {q.dtype} {list(q.shape)}.")


def _autocast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    # torch 2.11 cannot trace is_autocast_available; a traced model is on a device that has it
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x for x in tensors]

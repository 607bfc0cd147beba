"""The registered operators, and the choice of their implementation.

``backend`` is "auto" (Triton on CUDA if supported, else PyTorch), "triton" (which also takes CPU tensors under
TRITON_INTERPRET=1, for tests) or "torch". Triton is imported on first use, because without a driver the import may fail.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .._common import add_op_namespace_prefix, no_autocast
from . import cpu
from . import reference as ref

BACKENDS = ("auto", "triton", "torch")
MAX_HEAD_DIM = 128  # wider heads would spill registers
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor, head_dim: int, backend: str) -> bool:
    """Return whether the Triton kernels run for this call."""
    if backend == "auto":
        return x.is_cuda and _HAS_TRITON and head_dim <= MAX_HEAD_DIM and x.dtype != torch.float64
    return backend == "triton"


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tokens_first(x: Tensor) -> Tensor:
    """Return [B, H, N, D] with the memory layout [B, N, H, D], so that joining the heads afterwards needs no copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_tokens_first(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


# --- the index of kept keys ---------------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("key_index"), mutates_args=())
def key_index(key_mask: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """``index [B, N]`` int32 (kept tokens in order, then the dropped) and ``count [B]`` int32 of a bool ``[B, N]`` mask."""
    if runs_triton(key_mask, 0, backend):
        from . import triton_rows

        return triton_rows.key_index(key_mask)
    return ref.key_index_reference(key_mask)


@key_index.register_fake
def _(key_mask: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    return key_mask.new_empty(key_mask.shape, dtype=torch.int32), key_mask.new_empty(key_mask.shape[0], dtype=torch.int32)


# --- all queries over the kept keys of their image ----------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("masked_attention"), mutates_args=())
def masked_attention_op(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, N, D]`` and lse ``[B, H, N]`` (float32 at least); index and count as ``key_index`` gives them."""
    if runs_triton(q, q.shape[-1], backend):
        from . import triton

        return triton.attention_forward(q, k, v, count, index, q.shape[2], scale)
    q_wide, k_wide, v_wide = (x.to(_wide(x)) for x in (q, k, v))
    with no_autocast(q.device):
        out, lse = ref.masked_attention_reference(q_wide, k_wide, v_wide, ref.key_mask_of(index, count), scale)
    return _tokens_first(out.to(q.dtype)), lse


@masked_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return _empty_tokens_first(q), q.new_empty(q.shape[:3], dtype=_wide(q))


@torch.library.custom_op(add_op_namespace_prefix("masked_attention_backward"), mutates_args=())
def masked_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    index: Tensor, count: Tensor, scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, ``[B, H, N, D]`` each."""
    if runs_triton(q, q.shape[-1], backend):
        from . import triton

        return triton.attention_backward(grad, q, k, v, out, lse, count, index, q.shape[2], scale)
    g, q_wide, k_wide, v_wide, o = (x.to(_wide(x)) for x in (grad, q, k, v, out))
    with no_autocast(q.device):
        dq, dk, dv = ref.attention_backward(g, q_wide, k_wide, v_wide, o, lse, ref.key_mask_of(index, count), scale)
    return _tokens_first(dq.to(q.dtype)), _tokens_first(dk.to(k.dtype)), _tokens_first(dv.to(v.dtype))


@masked_attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    index: Tensor, count: Tensor, scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_tokens_first(q), _empty_tokens_first(k), _empty_tokens_first(v)


def _masked_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, count, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, index, count)


def _masked_backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, index, count = ctx.saved_tensors
    grads = masked_attention_backward_op(grad, q, k, v, out, lse, index, count, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


masked_attention_op.register_autograd(_masked_backward, setup_context=_masked_context)


# --- packed segments ----------------------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("varlen_attention"), mutates_args=())
def varlen_attention_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Output ``[T, H, D]`` and lse ``[H, T]`` (float32 at least)."""
    if runs_triton(q, q.shape[-1], backend):
        from . import triton

        return triton.attention_forward(q, k, v, cu_seqlens, cu_seqlens, max_len, scale)
    if q.device.type == "cpu":
        return cpu.varlen_forward(q, k, v, cu_seqlens, max_len, scale)
    q_wide, k_wide, v_wide = (x.to(_wide(x)) for x in (q, k, v))
    with no_autocast(q.device):
        out, lse = ref.varlen_attention_reference(q_wide, k_wide, v_wide, cu_seqlens, scale)
    return out.to(q.dtype), lse


@varlen_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=_wide(q))


@torch.library.custom_op(add_op_namespace_prefix("varlen_attention_backward"), mutates_args=())
def varlen_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_len: int, scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, ``[T, H, D]`` each."""
    if runs_triton(q, q.shape[-1], backend):
        from . import triton

        return triton.attention_backward(grad, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_len, scale)
    if q.device.type == "cpu":
        return cpu.varlen_backward(grad, q, k, v, out, lse, cu_seqlens, max_len, scale)
    g, q_wide, k_wide, v_wide, o = (x.to(_wide(x)) for x in (grad, q, k, v, out))
    with no_autocast(q.device):
        dq, dk, dv = ref.varlen_attention_backward(g, q_wide, k_wide, v_wide, o, lse, cu_seqlens, scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@varlen_attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_len: int, scale: float, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _varlen_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_len, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _varlen_backward(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = varlen_attention_backward_op(grad, q, k, v, out, lse, cu_seqlens, ctx.max_len, ctx.scale, ctx.backend)
    return *grads, None, None, None, None


varlen_attention_op.register_autograd(_varlen_backward, setup_context=_varlen_context)


# --- rows by index, there and back --------------------------------------------------------------------------------------


@torch.library.custom_op(add_op_namespace_prefix("take_rows"), mutates_args=())
def take_rows(source: Tensor, index: Tensor, inverse: Tensor, fill: float, backend: str = "auto") -> Tensor:
    """Rows of ``source [M, C]`` by ``index [K]`` int32 (-1 gives ``fill``, -2 NaN).

    ``inverse [M]`` is the position of each source row in the result (-1: none), so that the backward is a gather too.
    """
    if runs_triton(source, 0, backend):
        from . import triton_rows

        return triton_rows.take_rows(source, index, fill)
    return ref.take_rows_reference(source, index, fill)


@take_rows.register_fake
def _(source: Tensor, index: Tensor, inverse: Tensor, fill: float, backend: str = "auto") -> Tensor:
    return source.new_empty(index.shape[0], source.shape[1])


def _take_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, inverse, _, ctx.backend = inputs
    ctx.save_for_backward(index, inverse)


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, inverse = ctx.saved_tensors
    return take_rows(grad, inverse, index, 0.0, ctx.backend), None, None, None, None


take_rows.register_autograd(_take_backward, setup_context=_take_context)

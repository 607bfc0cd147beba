"""Gradient of masked attention with respect to the weight of each key, for kept and masked tokens."""

from typing import Any

import torch
from torch import Tensor

ELEMENTS = 1 << 24  # scores held in memory in the backward pass
LARGEST = 30.0  # limit of a masked key's log odds: exp(30) is far beyond any useful gradient, exp(89) is inf in float32


def with_key_gradient(out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """Return ``out``, with a gradient for the weight of each key.

    With weights w, attention is ``sum_j w_j exp(s_ij) v_j / sum_j w_j exp(s_ij)``. If w is 1 for kept keys and 0 for masked
    ones, this is masked attention, and its derivative by w_j is ``exp(s_ij) (v_j - out_i) / sum_kept exp(s_ij)`` for every j.
    Only this derivative is added here; the output and the gradients of q, k and v are those of masked attention.

    Args:
        out: ``[B, H, N, D]``, output of masked attention.
        q, k, v: ``[B, H, N, D]``, its inputs. Masked keys and values must be finite.
        weight: ``[B, N]``, 1 where a token is a key and 0 elsewhere.
        key_mask: ``[B, N]`` bool, True = kept.
        scale: factor of the scores.

    Source: derived from the definition; used for the straight-through masks of iFAM.
    """
    linked: Tensor = _KeyGradient.apply(out, q, k, v, weight, key_mask, scale)
    return linked


class _KeyGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, key_mask: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(out, q, k, v, key_mask)
        ctx.scale, ctx.dtype = scale, weight.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, q, k, v, key_mask = ctx.saved_tensors
        images = max(1, ELEMENTS // (q.shape[1] * q.shape[2] ** 2))
        parts = [x.split(images) for x in (grad, out, q, k, v, key_mask)]
        with torch.autocast(q.device.type, enabled=False):
            to_weight = torch.cat([_of_images(*part, scale=ctx.scale) for part in zip(*parts)])
        return grad, None, None, None, to_weight.to(ctx.dtype), None, None


def _of_images(grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, *, scale: float) -> Tensor:
    """The gradient ``[B, N]`` of the weights of a few images' keys."""
    exact = torch.promote_types(q.dtype, torch.float32)
    grad, out, q, k, v = (x.to(exact) for x in (grad, out, q, k, v))
    scores = q @ k.mT * scale  # [B, H, N, N]
    total = scores.masked_fill(~key_mask[:, None, None, :], float("-inf")).logsumexp(-1, keepdim=True)
    odds = (scores - total).clamp(max=LARGEST).exp()  # for a masked key, the odds it would have among the kept ones
    change = grad @ v.mT - (grad * out).sum(-1, keepdim=True)
    return torch.where(total == float("-inf"), 0.0, odds * change).sum((1, 2))

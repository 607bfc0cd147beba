"""How far the predictions for two views of the same rows differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence per row: the mean KL of both predictions from their mean.

    It is symmetric and at most log 2. Source: the consistency loss of AugMix (Hendrycks et al., arXiv 1912.02781, section 3),
    there with three predictions; see `docs/method.md`, section 3.

    Args:
        first, second: logits `[B, classes]`.

    Returns:
        `[B]`, in nats.

    >>> float(jensen_shannon(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])))
    0.6931471824645996
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    mean = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - mean) + q.exp() * (q - mean)).sum(-1) / 2

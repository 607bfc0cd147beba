"""Tabular metadata (site, habitat, month) as a model of the background (L2R2 5.1, `docs/method.md`, section 5) [R]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import L2R2Error


class MetadataPrior:
    """Corrects log-probabilities by how often each class occurs with a metadata value.

    p(y | x, m) is proportional to p(y | x) p(y | m) / p(y), with the image x independent of the metadata m given the class y,
    and the counts of the training rows with additive smoothing.

    Args:
        labels: `[N]` int64 of the training rows.
        values: their metadata values.
        classes: number of classes.
        smoothing: added to each count.

    Raises:
        L2R2Error: no row, not one value a row, or a smoothing that is not positive.
    """

    def __init__(self, labels: Tensor, values: Sequence[str], classes: int, smoothing: float = 1.0) -> None:
        if not len(labels) or len(labels) != len(values):
            raise L2R2Error(f"A metadata prior needs one value a training row, got {len(values)} for {len(labels)} rows.")
        if not smoothing > 0:
            raise L2R2Error(f"The smoothing of a metadata prior must be positive, got {smoothing}.")
        self._rows = {value: i for i, value in enumerate(sorted(set(values)))}
        index = torch.tensor([self._rows[value] for value in values])
        counts = torch.zeros(len(self._rows), classes, dtype=torch.float64)
        counts.index_put_((index, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
        given = (counts + smoothing) / (counts + smoothing).sum(1, keepdim=True)  # p(y | m)
        overall = (counts.sum(0) + smoothing) / (counts.sum(0) + smoothing).sum()  # p(y)
        self._shift = torch.cat([given.log() - overall.log(), torch.zeros(1, classes, dtype=torch.float64)])  # last: unknown

    def __call__(self, logits: Tensor, values: Sequence[str]) -> Tensor:
        """Log-probabilities `[N, classes]` of logits `[N, classes]`; a value that training did not have changes nothing."""
        index = torch.tensor([self._rows.get(value, len(self._rows)) for value in values])
        return (logits.log_softmax(-1) + self._shift[index].to(logits)).log_softmax(-1)

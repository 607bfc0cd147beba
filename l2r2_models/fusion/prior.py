"""Tabular metadata (site, habitat, month) as a model of the background (L2R2 5.1; `docs/method.md`, section 5) [R]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import L2R2Error


class MetadataPrior:
    """Correct class probabilities by how often each class occurs with a metadata value.

    p(y | x, m) is proportional to p(y | x) p(y | m) / p(y), assuming that the image x and the metadata m are independent given
    the class y. p(y | m) and p(y) are the counts of the training rows with additive smoothing.

    Args:
        labels: `[N]` int64 class indices of the training rows.
        values: their metadata values.
        classes: number of classes.
        smoothing: pseudo-count added to each count.

    Raises:
        L2R2Error: when there are no rows, the number of values is not N, or `smoothing` is not positive.

    >>> import torch
    >>> prior = MetadataPrior(torch.tensor([0, 1, 1]), ["forest", "lake", "lake"], classes=2)
    >>> prior(torch.zeros(2, 2), ["forest", "lake"]).argmax(-1).tolist()
    [0, 1]
    """

    def __init__(self, labels: Tensor, values: Sequence[str], classes: int, smoothing: float = 1.0) -> None:
        if not len(labels) or len(labels) != len(values):
            raise L2R2Error(f"A metadata prior needs one value per training row, got {len(values)} for {len(labels)} rows.")
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
        """Return the corrected log-probabilities of logits `[N, classes]`; values not seen in training have no effect."""
        index = torch.tensor([self._rows.get(value, len(self._rows)) for value in values])
        return (logits.log_softmax(-1) + self._shift[index].to(logits)).log_softmax(-1)

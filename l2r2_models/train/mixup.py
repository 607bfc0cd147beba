"""Mixup and cutmix of the views of a branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ViewMixup:
    """Mixup or cutmix of views and their targets, drawn separately for each branch.

    Source: mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), through torchvision's transforms.

    Args:
        classes: number of classes.
        mixup, cutmix: alpha of the Beta distribution of the mixing ratio; 0 turns it off. If both are on, one is drawn per batch.
        probability: probability that a batch is mixed.
    """

    def __init__(self, classes: int, mixup: float, cutmix: float, probability: float = 1.0) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
        self.classes, self.probability = classes, probability

    def __call__(self, view: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the given rows with each other only, so that views with an object are not mixed with views without one.

        Args:
            view: `[B, C, S, S]`.
            labels: `[B]` class indices.
            rows: `[B]` bool, the rows to mix.

        Returns:
            Views `[B, C, S, S]`, and targets `[B, classes]` that sum to one.
        """
        targets = nn.functional.one_hot(labels, self.classes).to(torch.float32)
        if torch.rand(()) >= self.probability or int(rows.sum()) < 2:
            return view, targets
        kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
        mixed, shares = kind(view[rows], labels[rows])
        view = view.clone()
        view[rows], targets[rows] = mixed, shares.to(targets)
        return view, targets

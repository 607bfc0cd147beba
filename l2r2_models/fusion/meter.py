"""Estimate how often backgrounds mislead from how well the branches agree (`docs/method.md`, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

STEPS = 1001  # grid points of e in [0, 1], with 0.5 among them
NEARLY = 0.99  # factor of a correlation, which keeps the z of a perfect one finite and insensitive to rounding
SHRINK = 1.0  # strength of the prior that pulls the offset and slope of a logistic regression toward 0 and 1
LEAST = 1e-6  # of the variance of a mean


class ShiftMeter(nn.Module):
    """Estimate the fraction e of misleading backgrounds in a group of images, without labels.

    The *clue* of an image is the probability that its background is a usual one: a logistic regression on Fisher's z of the
    correlation between the logits of fg and of the context, fitted on held-out rows with usual and with other backgrounds. The
    mean clue of a group lies between the means of both kinds of rows, nearer to that of the other backgrounds the larger e is
    (an adjusted count of probabilities, Bella et al. 2010).

    Images of one class often come from one place or video, and some classes have higher clues than others. So the mean of a group
    is as uncertain as the number of its *classes* lets it be, however many images it has; the same holds for the held-out rows.

    Attributes:
        line: `[2]` offset and slope of the logistic regression.
        moments: `[3, 2]` mean and variance of the clues, and number of observations, of the held-out rows of each kind (usual,
            other).
        between: `[2, 2]` covariance of the mean clues of the two kinds over classes.
        classes: number of classes in the held-out rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line: Tensor
        self.register_buffer("line", torch.tensor([0.0, 1.0]))
        self.moments: Tensor
        self.register_buffer("moments", torch.tensor([[1.0, 0.0], [0.25, 0.25], [1.0, 1.0]]))
        self.between: Tensor
        self.register_buffer("between", torch.zeros(2, 2))
        self.classes: Tensor
        self.register_buffer("classes", torch.tensor(1.0))

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, away: Tensor, weights: Tensor) -> None:
        """Fit the clue on held-out rows of both kinds.

        Args:
            fg: `[N, classes]` logits of fg.
            context: `[K, N, classes]` logits of the context branches.
            labels: `[N]` int64 class indices.
            away: `[N]` bool, True for rows with other backgrounds.
            weights: `[N]` number of observations per row.
        """
        self.line.copy_(logistic(agreement_of(fg, context), ~away, weights.double()))
        clues, w = self.clues(fg, context), weights.double()
        kinds = (~away, away)
        for kind, rows in enumerate(kinds):
            mean = _mean(clues[rows], w[rows])
            variance = _mean((clues[rows] - mean).square(), w[rows])
            self.moments[:, kind] = torch.stack([mean, variance, w[rows].sum()]).to(self.moments)
        found = sorted(set(labels[~away].tolist()) & set(labels[away].tolist()))
        means = [[_mean(clues[own], w[own]) for own in (rows & (labels == label) for label in found)] for rows in kinds]
        self.classes.fill_(max(1, len(found)))
        self.between.copy_(torch.tensor(means).cov() if len(found) > 1 else torch.zeros(2, 2))

    def clues(self, fg: Tensor, context: Tensor) -> Tensor:
        """Return the clue `[B]` float64 of each object, in [0, 1]; see `fit` for the arguments."""
        return (self.line[0].double() + self.line[1].double() * agreement_of(fg, context)).sigmoid()

    @torch.jit.ignore
    def posterior(self, means: Tensor, count: int, classes: int | None = None) -> Tensor:
        """Return the posterior of e on a grid, given the mean clue of a group and a uniform prior.

        Given e, the mean of `count` clues is taken as normal. Its variance includes the uncertainty of the means of the held-out
        rows.

        Args:
            means: `[k]` float64, one per group.
            count: number of objects that each mean was computed on, at least 1.
            classes: number of classes that these objects have, at least 1; None takes all objects and all held-out rows as
                independent draws, which gives a narrower posterior around the same mean clue.

        Returns:
            `[k, STEPS]` probabilities, see `grid`.
        """
        e = grid(means)
        (usual, other), (usual_variance, other_variance), (usual_rows, other_rows) = self.moments.to(means)
        each = (1 - e) * usual_variance + e * other_variance + e * (1 - e) * (usual - other).square()
        held_out = (1 - e).square() * usual_variance / usual_rows + e.square() * other_variance / other_rows
        variance = each / count + held_out
        if classes is not None:
            kinds = torch.stack([1 - e, e])
            of_class = (kinds * (self.between.to(means) @ kinds)).sum(0)
            variance = each / count + torch.maximum(held_out, of_class / self.classes.to(means)) + of_class / classes
        variance = variance.clamp(min=LEAST)
        gap = means[:, None] - (1 - e) * usual - e * other
        log: Tensor = -gap.square() / (2 * variance) - variance.log() / 2
        return log.softmax(1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return weights @ values / weights.sum()


def grid(like: Tensor) -> Tensor:
    """Return the values `[STEPS]` of e, in the type and on the device of a tensor."""
    return (torch.arange(STEPS, dtype=like.dtype, device=like.device) + 0.5) / STEPS


def agreement_of(fg: Tensor, context: Tensor) -> Tensor:
    """Return Fisher's z `[B]` float64 of the correlation over the classes between fg and the mean of the context branches."""
    one, other = (z.double() - z.double().mean(-1, keepdim=True) for z in (fg, context.double().mean(0)))
    return (NEARLY * cosine_similarity(one, other, dim=-1)).atanh()


def logistic(x: Tensor, home: Tensor, weights: Tensor) -> Tensor:
    """Fit b and s of `P(home) = sigmoid(b + s x)` by Newton's method, with s >= 0.

    Home and away rows have the same total weight, and the prior is normal around b = 0 and s = 1.

    Args:
        x: `[N]` float64.
        home: `[N]` bool.
        weights: `[N]` float64.

    Returns:
        `[2]` float64, b and s.
    """
    columns, y = torch.stack([torch.ones_like(x), x], 1), home.to(x)
    w = weights.sum() / 2 * torch.where(home, weights / weights[home].sum(), weights / weights[~home].sum())
    start = torch.tensor([0.0, 1.0], dtype=x.dtype)
    fitted = start.clone()
    for _ in range(50):
        p = (columns @ fitted).sigmoid()
        slope = columns.T @ (w * (p - y)) + (fitted - start) / SHRINK
        curve = (columns.T * (w * p * (1 - p))) @ columns + torch.eye(2, dtype=x.dtype) / SHRINK
        fitted = fitted - torch.linalg.solve(curve, slope)
    return torch.stack([fitted[0], fitted[1].clamp(min=0)])

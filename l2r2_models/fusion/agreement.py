"""Fusions that weigh the context by how well it agrees with fg (`docs/method.md`, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from .base import register_fusion
from .calibration import fit_temperature
from .meter import ShiftMeter, logistic
from .scaled import Scaled

GRID = 21  # candidate values of `subtract`


@register_fusion
class Agreement(Scaled):
    """Reweight the fg probabilities by the context, allowing for misleading backgrounds.

    `p(y) ~ f(y) [e + (1 - e) c(y) / pi(y)]`, where f and c are the softmax of fg and of the context (the mean of its branches)
    after temperature scaling, pi is the class prior of the training rows, and e is the fraction of images with a misleading
    background. With `e = 1` the result is fg alone; with `e = 0` it is the product of experts, which is exact where object and
    context are independent given the class (SFB, NeurIPS 2023). Derivation: `docs/method.md`, section 4.

    `fit` sets the temperatures: that of fg on all rows, those of the context on rows with their usual backgrounds.

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.
        class_wise: fit one temperature per class and branch instead of one per branch.
        misled: e, in [0, 1].

    Raises:
        L2R2Error: when `misled` is not a number in [0, 1].
    """

    name = "agreement"

    def __init__(self, inputs: int = 2, classes: int = 0, class_wise: bool = False, misled: float = 0.5) -> None:
        super().__init__(inputs, classes, class_wise)
        if isinstance(misled, bool) or not isinstance(misled, (int, float)) or not 0 <= misled <= 1:
            raise L2R2Error(f'Fusion "{self.name}" needs a fraction of misleading backgrounds between 0 and 1, got {misled}.')
        self.misled: Tensor
        self.register_buffer("misled", torch.tensor(float(misled)))
        self.prior: Tensor
        self.register_buffer("prior", torch.full((classes,), 1 / max(classes, 1)))

    def combine(self, fg: Tensor, context: Tensor) -> Tensor:
        """Fuse with the fixed e; returns log-probabilities `[B, classes]`."""
        return self.mixed(fg, context, self.misled)

    def mixed(self, fg: Tensor, context: Tensor, misled: Tensor) -> Tensor:
        """Fuse as `combine` does, with another e: a scalar, or one value per row `[B, 1]`."""
        f, c = self.experts(fg, context)
        return (f + torch.logaddexp(misled.to(f).log(), (1 - misled.to(f)).log() + c)).log_softmax(-1)

    def experts(self, fg: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return `log f` and `log c - log pi`, both `[B, classes]`."""
        z = self.scaled(fg, context)
        return z[0].log_softmax(-1), z[1:].mean(0).log_softmax(-1) - self.prior.to(z).log()

    def evidence(self, fg: Tensor, context: Tensor) -> Tensor:
        """Return the log likelihood ratio `[B]` of a usual to a misleading background: `log sum_y f(y) c(y) / pi(y)`."""
        f, c = self.experts(fg, context)
        return (f + c).logsumexp(-1)

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return all rows if every background misleads (e = 1), else none; see `Fusion.decided`."""
        return (self.misled >= 1).expand(len(fg))

    @torch.jit.ignore
    def set_prior(self, counts: Tensor) -> None:
        """Store the class prior, estimated from the training rows per class `[classes]` with add-one smoothing."""
        self.prior.copy_((counts + 1) / (counts + 1).sum())

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit one temperature per branch; see `Fusion.fit`."""
        usual = torch.ones_like(labels, dtype=torch.bool) if away is None or bool(away.all()) else ~away
        super().fit(fg, context, labels, weights, away)
        if not self.class_wise:
            for row, logits in zip(self.temperatures[1:], context):
                row.fill_(fit_temperature(logits[usual], labels[usual], None if weights is None else weights[usual]))

    @torch.jit.ignore
    def chosen(self) -> dict[str, Any]:
        """Return `class_wise` and `misled`, which `fit` does not change."""
        return {**super().chosen(), "misled": round(self.misled.item(), 6)}


@register_fusion
class TwoWorlds(Agreement):
    """Mix two fusions: one for backgrounds as in training ("home"), one for misleading backgrounds ("away").

    At home `p(y) ~ f(y) (c(y) / pi(y))^h`; away `p(y) ~ f(y) (pi(y) / c(y))^a`, which discounts the misled context. An image is
    at home with odds `(1 - e) r^s exp(b) : e`, where `r = sum_y away(y) c(y) / pi(y)` measures how well fg and context agree.
    With `a = b = 0` and `h = s = 1` this is `agreement`. `fit` sets the temperatures as in `Agreement`, `b` and `s` by logistic
    regression of home against away on log r, and `a` by the likelihood of rows with misleading backgrounds. `h` is 1 if that
    makes rows with usual backgrounds more accurate than fg alone, else 0. Derivation: `docs/method.md`, section 4.

    Args:
        inputs: number of branches that are fused.
        classes: number of classes.
        class_wise: fit one temperature per class and branch instead of one per branch.
        misled: e, in [0, 1].

    Raises:
        L2R2Error: when `misled` is not a number in [0, 1].
    """

    name = "two_worlds"

    def __init__(self, inputs: int = 2, classes: int = 0, class_wise: bool = False, misled: float = 0.5) -> None:
        super().__init__(inputs, classes, class_wise, misled)
        self.subtract: Tensor
        self.register_buffer("subtract", torch.tensor(0.0))
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))  # b and s
        self.trust: Tensor
        self.register_buffer("trust", torch.tensor(1.0))  # h
        self.meter = ShiftMeter()

    def mixed(self, fg: Tensor, context: Tensor, misled: Tensor) -> Tensor:
        """Fuse with another e: a scalar, or one value per row `[B, 1]`."""
        f, c = self.experts(fg, context)
        away, e = (f - self.subtract.to(f) * c).log_softmax(-1), misled.to(f)
        home = (1 - e).log() + self.evidence(fg, context)[:, None] + (f + self.trust.to(f) * c).log_softmax(-1)
        return torch.logaddexp(home, e.log() + away).log_softmax(-1)

    @torch.jit.ignore
    def decided(self, fg: Tensor, objectness: Tensor) -> Tensor:
        """Return all rows if every background misleads and the context is not subtracted; see `Fusion.decided`."""
        return ((self.misled >= 1) & (self.subtract == 0)).expand(len(fg))

    def evidence(self, fg: Tensor, context: Tensor) -> Tensor:
        """Return the log likelihood ratio `[B]` of home to away: `b + s log r`."""
        f, c = self.experts(fg, context)
        r = ((f - self.subtract.to(f) * c).log_softmax(-1) + c).logsumexp(-1)
        return self.scale[0].to(f) + self.scale[1].to(f) * r

    @torch.jit.ignore
    def fit(self, fg: Tensor, context: Tensor, labels: Tensor, weights: Tensor | None = None, away: Tensor | None = None) -> None:
        """Fit the temperatures, `a`, `b`, `s` and `h`; without both kinds of rows, only the temperatures."""
        super().fit(fg, context, labels, weights, away)
        self.subtract.zero_()
        self.trust.fill_(1)
        self.scale.copy_(torch.tensor([0.0, 1.0]))
        if away is None or bool(away.all()) or not away.any():
            return
        w = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
        f, c = (z.double() for z in self.experts(fg, context))
        losses = [w[away] @ _cross_entropy((f - a * c)[away], labels[away]) for a in torch.linspace(0, 1, GRID).tolist()]
        self.subtract.fill_(int(torch.stack(losses).argmin()) / (GRID - 1))
        self.scale.copy_(logistic(self.evidence(fg, context).double(), ~away, w))
        self.meter.fit(fg, context, labels, away, w)
        right, alone = (((z.argmax(-1) == labels)[~away].double()) for z in (f + c, f))
        self.trust.fill_(float((right - alone).mean() > 0))

    @torch.jit.ignore
    def count(self) -> int:
        """Return the number of temperatures plus four, for `a`, `b`, `s` and `h`."""
        return self.temperatures.numel() + 4


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

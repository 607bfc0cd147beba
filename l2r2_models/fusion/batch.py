"""Fuse many images of one place: the share of misleading backgrounds shows without labels (`docs/method.md`, section 4)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import L2R2Error
from .agreement import TwoWorlds
from .base import INPUTS, Fusion, fuse_branches, fused_logits

PRIOR = 1.5  # both parameters of the beta distribution of e before any image is seen; its mean is that of the fixed rule, 0.5
STEPS = 1000  # of e from 0 to 1
ROWS = 1024  # that are worked on at once
UNFITTED = "This model was not fitted to know its batch; fit it with `l2r2 fuse` on held-out rows with boxes first."
LEVEL = 0.95  # of an interval


@dataclass(frozen=True)
class GroupShare:
    """What the images of a group say about their backgrounds.

    Attributes:
        objects: how many objects were compared with their backgrounds.
        misled: estimated share of backgrounds that mislead, the mean of the posterior; low, high: its 95 % credible interval.
    """

    objects: int
    misled: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.misled:.0f} % of backgrounds mislead ({100 * self.low:.0f}-{100 * self.high:.0f})"


@dataclass(frozen=True)
class Adapted:
    """Logits `[B, classes]` fused by group, and what the backgrounds of each group are like."""

    logits: Tensor
    shares: dict[Hashable, GroupShare]


def fuse_groups(
    fusion: Fusion,
    logits: Mapping[str, Tensor],
    has_fg: Tensor,
    groups: Sequence[Hashable],
    objectness: Tensor | None = None,
) -> Adapted:
    """`fuse_branches`, knowing which images are of one place.

    Each object is fused by the batch rule of `fusion` (a `two_worlds`) with the e that the *other* objects of its group suggest:
    the mean of e's posterior given their evidence, which is the exact Bayes rule of that mixture. An object that is alone in its
    group is fused as without groups. Neither the order of rows nor that of groups matters.

    Args:
        fusion: fitted with rows on other backgrounds, so that it has a batch rule.
        logits, has_fg, objectness: see `fuse_branches`.
        groups: one value a row.

    Raises:
        L2R2Error: the fusion has no batch rule, or there is not one group for each row.
    """
    rule = fusion.batch
    if rule is None:
        raise L2R2Error(UNFITTED)
    if len(groups) != len(has_fg):
        raise L2R2Error(f"{len(groups)} groups for {len(has_fg)} rows; give one for each.")
    fused = fuse_branches(fusion, logits, has_fg, objectness).clone()
    found = fused_logits(fusion, logits)
    assert found is not None  # a fusion with a batch rule has two branches
    _, fg, context = found
    rows = has_fg.nonzero()[:, 0]
    misled, shares = shares_of(rule.evidence(fg[rows], context[:, rows]), [groups[i] for i in rows.tolist()])
    together = misled.isfinite()
    rows, misled = rows[together], misled[together].to(fused)
    fused[rows] = rule.mixed(fg[rows], context[:, rows], misled[:, None]).to(fused)
    empty = {group: _share(_posterior(misled[:0].double()), 0) for group in groups if group not in shares}
    return Adapted(fused, {**shares, **empty})


def shares_of(evidence: Tensor, groups: Sequence[Hashable]) -> tuple[Tensor, dict[Hashable, GroupShare]]:
    """The share of misleading backgrounds, as each object and each group have it.

    Args:
        evidence: `[n]`, see `TwoWorlds.evidence`. groups: one value an object.

    Returns:
        `[n]` float64 mean of e given the other objects of the group, NaN where there are none; and what the groups are like.
    """
    members: dict[Hashable, list[int]] = {group: [] for group in groups}
    for i, group in enumerate(groups):
        members[group].append(i)
    evidence = evidence.double()
    misled, shares = torch.full_like(evidence, float("nan")), {}
    for group, indices in members.items():
        own = evidence[indices]
        posterior = _posterior(own)
        shares[group] = _share(posterior, len(indices))
        if len(indices) > 1:
            misled[indices] = _without_itself(posterior, own)
    return misled, shares


def fit_batch(
    fusion: Fusion, logits: Mapping[str, Tensor], labels: Tensor, weights: Tensor, away: Tensor, counts: Tensor
) -> TwoWorlds | None:
    """The batch rule of a fusion, a `two_worlds` on its branches; None where fg is none of them, or all rows are of one kind.

    Args:
        logits: `[N, classes]` by branch of held-out rows with an object; labels, weights, away: see `Fusion.fit`.
        counts: `[classes]` training rows by class.
    """
    used = [b for b in INPUTS if b in logits and (fusion.over is None or b in fusion.over)]
    if used[0] != "fg" or bool(away.all()) or not away.any():
        return None
    rule = TwoWorlds(len(used), len(counts))
    with torch.no_grad():
        rule.set_prior(counts)
        rule.fit(logits["fg"], torch.stack([logits[b] for b in used[1:]]), labels, weights, away)
    return rule


def _grid(like: Tensor) -> Tensor:
    return (torch.arange(STEPS, dtype=torch.float64, device=like.device) + 0.5) / STEPS


def _likelihood(evidence: Tensor) -> Tensor:
    """`[n, STEPS]` log of `(1 - e) r + e` on the grid of e, r being the exponential of the evidence `[n]`."""
    e = _grid(evidence)
    return torch.logaddexp((1 - e).log()[None] + evidence[:, None], e.log()[None])


def _posterior(evidence: Tensor) -> Tensor:
    """`[STEPS]` probabilities of e given the evidence `[n]` of a group."""
    e = _grid(evidence)
    total = (PRIOR - 1) * (e.log() + (1 - e).log())
    for part in evidence.sort().values.split(ROWS):  # sorted, so that the sum is the same in any order
        total = total + _likelihood(part).sum(0)
    return total.softmax(0)


def _without_itself(posterior: Tensor, evidence: Tensor) -> Tensor:
    """`[n]` mean of e given the evidence of all but each one itself."""
    e, found = _grid(evidence), []
    for part in evidence.split(ROWS):
        others = (posterior.log()[None] - _likelihood(part)).softmax(1)
        found.append(others @ e)
    return torch.cat(found)


def _share(posterior: Tensor, objects: int) -> GroupShare:
    e, reached = _grid(posterior), posterior.cumsum(0)
    low, high = (float(e[int((reached < p).sum().clamp(max=STEPS - 1))]) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return GroupShare(objects, float(posterior @ e), low, high)

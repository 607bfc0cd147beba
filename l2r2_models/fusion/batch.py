"""Fusion of images taken at the same place, with the fraction of misleading backgrounds estimated without labels.

Source: `docs/method.md`, section 4.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import L2R2Error
from .agreement import TwoWorlds
from .base import INPUTS, Fusion, fuse_branches, fused_logits

PRIOR = 1.5  # both parameters of the beta prior of e; its mean, 0.5, is the e of the fixed rule
STEPS = 1000  # grid points of e in [0, 1]
ROWS = 1024  # processed at once
UNFITTED = "The fusion of this model has no batch rule; fit it with `l2r2 fuse` on held-out rows with boxes first."
LEVEL = 0.95  # of the credible interval


@dataclass(frozen=True)
class GroupShare:
    """Estimated fraction of misleading backgrounds in a group of images.

    Attributes:
        objects: number of objects that were compared with their backgrounds.
        misled: posterior mean of the fraction, in [0, 1].
        low: lower end of its 95 % credible interval.
        high: upper end of the interval.

    >>> str(GroupShare(objects=40, misled=0.25, low=0.1, high=0.4))
    '25 % of backgrounds mislead (10-40)'
    """

    objects: int
    misled: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.misled:.0f} % of backgrounds mislead ({100 * self.low:.0f}-{100 * self.high:.0f})"


@dataclass(frozen=True)
class Adapted:
    """Logits `[B, classes]` fused by group, and the share of misleading backgrounds per group."""

    logits: Tensor
    shares: dict[Hashable, GroupShare]


def fuse_groups(
    fusion: Fusion,
    logits: Mapping[str, Tensor],
    has_fg: Tensor,
    groups: Sequence[Hashable],
    objectness: Tensor | None = None,
) -> Adapted:
    """Fuse as `fuse_branches` does, given which images were taken at the same place.

    Each object is fused by the batch rule of `fusion`, a `two_worlds` fusion. Its e is the posterior mean given the evidence of
    the *other* objects in its group, which is the exact Bayes rule for this mixture. An object alone in its group is fused as
    without groups. The result does not depend on the order of rows or groups.

    Args:
        fusion: a fusion with a batch rule, i.e. fitted with rows on other backgrounds too.
        logits: `[B, classes]` by branch.
        has_fg: `[B]` bool, True where an object was found.
        groups: one value per row.
        objectness: `[B]` box scores, see `fuse_branches`.

    Raises:
        L2R2Error: when the fusion has no batch rule, or the number of groups is not the number of rows.
    """
    rule = fusion.batch
    if rule is None:
        raise L2R2Error(UNFITTED)
    if len(groups) != len(has_fg):
        raise L2R2Error(f"{len(groups)} groups for {len(has_fg)} rows; pass one per row.")
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
    """Estimate the fraction e of misleading backgrounds per object and per group.

    Args:
        evidence: `[n]`, see `TwoWorlds.evidence`.
        groups: one value per object.

    Returns:
        The posterior mean `[n]` float64 of e given the other objects of the group, NaN for an object alone in its group; and
        the share per group.
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
    """Fit the batch rule of a fusion, a `two_worlds` on its branches.

    Args:
        fusion: the fusion whose branches are used.
        logits: `[N, classes]` by branch, of held-out rows with an object.
        labels: `[N]` int64 class indices.
        weights: `[N]` number of observations per row.
        away: `[N]` bool, True for rows whose background is unrelated to the class.
        counts: `[classes]` training rows per class.

    Returns:
        The fitted rule; None if the fusion does not use fg, or if all rows, or none, are away.
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
    """Return `log((1 - e) r + e)` `[n, STEPS]` on the grid of e, where r is the exponential of the evidence `[n]`."""
    e = _grid(evidence)
    return torch.logaddexp((1 - e).log()[None] + evidence[:, None], e.log()[None])


def _posterior(evidence: Tensor) -> Tensor:
    """Return the posterior `[STEPS]` of e given the evidence `[n]` of a group."""
    e = _grid(evidence)
    total = (PRIOR - 1) * (e.log() + (1 - e).log())
    for part in evidence.sort().values.split(ROWS):  # sorted, so that the sum is the same in any order
        total = total + _likelihood(part).sum(0)
    return total.softmax(0)


def _without_itself(posterior: Tensor, evidence: Tensor) -> Tensor:
    """Return the leave-one-out posterior means `[n]` of e."""
    e, found = _grid(evidence), []
    for part in evidence.split(ROWS):
        others = (posterior.log()[None] - _likelihood(part)).softmax(1)
        found.append(others @ e)
    return torch.cat(found)


def _share(posterior: Tensor, objects: int) -> GroupShare:
    e, reached = _grid(posterior), posterior.cumsum(0)
    low, high = (float(e[int((reached < p).sum().clamp(max=STEPS - 1))]) for p in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return GroupShare(objects, float(posterior @ e), low, high)

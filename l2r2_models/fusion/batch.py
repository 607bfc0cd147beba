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
from .meter import ShiftMeter, grid

ROWS = 1024  # processed at once
UNFITTED = "The fusion of this model has no batch rule; fit it with `l2r2 fuse` on held-out rows with boxes first."
LEVEL = 0.95  # of the credible interval


@dataclass(frozen=True)
class GroupShare:
    """Estimated fraction of misleading backgrounds in a group of images.

    Attributes:
        objects: number of objects that were compared with their backgrounds.
        misled: most probable value of the fraction, in [0, 1].
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


UNKNOWN = GroupShare(objects=0, misled=0.5, low=0.0, high=1.0)  # of a group without objects


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

    Each object is fused by the batch rule of `fusion`, a `two_worlds` fusion. Its e is the posterior mean given the *other*
    objects in its group, see `ShiftMeter`. An object alone in its group is fused as without groups. The result does not depend
    on the order of rows or groups.

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
    clues, classes = rule.meter.clues(fg[rows], context[:, rows]), fg[rows].argmax(-1)
    misled, shares = shares_of(rule.meter, clues, classes, [groups[i] for i in rows.tolist()])
    together = misled.isfinite()
    rows, misled = rows[together], misled[together].to(fused)
    fused[rows] = rule.mixed(fg[rows], context[:, rows], misled[:, None]).to(fused)
    return Adapted(fused, {**dict.fromkeys(groups, UNKNOWN), **shares})


def shares_of(
    meter: ShiftMeter, clues: Tensor, classes: Tensor, groups: Sequence[Hashable]
) -> tuple[Tensor, dict[Hashable, GroupShare]]:
    """Estimate the fraction e of misleading backgrounds per object and per group.

    Args:
        meter: the meter of a batch rule.
        clues: `[n]` float64, see `ShiftMeter.clues`.
        classes: `[n]` int64, the class that fg predicts for each object.
        groups: one value per object.

    Returns:
        The posterior mean `[n]` float64 of e given the other objects of the group, NaN for an object alone in its group; and
        the share per group.
    """
    members: dict[Hashable, list[int]] = {group: [] for group in groups}
    for i, group in enumerate(groups):
        members[group].append(i)
    misled, shares = torch.full_like(clues, float("nan")), {}
    for group, indices in members.items():
        own = clues[indices]
        shares[group] = _share(meter, own, len(classes[indices].unique()))
        if len(indices) > 1:
            misled[indices] = _without_itself(meter, own)
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


def _mean(clues: Tensor) -> Tensor:
    """Return the mean `[1]` of clues, which is the same in any order to the last bit."""
    return clues.sort().values.mean()[None]


def _without_itself(meter: ShiftMeter, clues: Tensor) -> Tensor:
    """Return the posterior means `[n]` of e given the other objects of a group, as if they were independent draws.

    The wider posterior of `_share` would leave all fusions half way between both kinds of backgrounds.
    """
    others = (len(clues) * _mean(clues) - clues) / (len(clues) - 1)
    return torch.cat([(meter.posterior(part, len(clues) - 1) * grid(clues)).sum(1) for part in others.split(ROWS)])


def _share(meter: ShiftMeter, clues: Tensor, classes: int) -> GroupShare:
    posterior, e = meter.posterior(_mean(clues), len(clues), classes)[0], grid(clues)
    likely, order = posterior.sort(descending=True)
    inside = e[order[: int((likely.cumsum(0) < LEVEL).sum()) + 1]]  # the shortest interval, which may touch 0 or 1
    return GroupShare(len(clues), float(e[posterior.argmax()]), float(inside.min()), float(inside.max()))

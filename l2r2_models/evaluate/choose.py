"""Selection of a fusion by its regret against fg, full and their average (`docs/method.md`, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..fusion import INPUTS, create_fusion
from .fuse import Column, Fitted, columns_of, fit, fuse
from .logits import BranchLogits

ALONE = " alone"
NEGLIGIBLE = 0.01  # accuracy that a fusion may lose to fg in exchange for more elsewhere, however sure the loss
ONE_SIDED = 1.645  # standard errors of a one-sided test at 5 %
Columns = Mapping[str, Column]


@dataclass(frozen=True)
class Choice:
    """The chosen fusion.

    Attributes:
        name: name of the fusion.
        reason: why it was chosen, in one sentence.
        regret: regret by fusion and column, as a fraction.
    """

    name: str
    reason: str
    regret: dict[str, dict[str, float]]


def references(data: BranchLogits, group: str | None = None, metric: str = "accuracy") -> dict[str, dict[str, Column]]:
    """Compute the baseline metrics for fusions: those of each branch alone and of the average of all branches.

    Args:
        data: branch logits; a branch alone falls back to full (or bg) in rows without an object.
        group: metadata column, see `fit`.
        metric: `accuracy` or `macro_accuracy`.
    """
    average = create_fusion("average", tuple(data.logits), data.classes)
    fallback = data.logits.get("full", data.logits.get("bg"))
    found = {}
    for branch, z in data.logits.items():
        whole = z if fallback is None else z.where(data.has_fg[:, None], fallback)
        found[branch] = columns_of(whole, data, group, metric)
    return {**found, average.name: columns_of(fuse(average, data), data, group, metric)}


def lead_of(data: BranchLogits, inputs: Sequence[str] | None = None) -> str:
    """Return the leading branch: fg if it is one of the inputs, else the next one in the order of `INPUTS`."""
    return next(b for b in INPUTS if b in data.logits and (inputs is None or b in inputs))


def lead_alone(
    data: BranchLogits, inputs: Sequence[str] | None = None, group: str | None = None, metric: str = "accuracy"
) -> dict[str, Fitted]:
    """Return the leading branch with a fitted temperature as a candidate, e.g. `fg alone`; see `fit`."""
    name = "scaled_weighted_average"
    fitted = fit(data, [{"name": name, "weight": 1.0}], inputs=inputs, group=group, metric=metric)[name]
    return {lead_of(data, inputs) + ALONE: fitted}


def choose(fitted: Mapping[str, Fitted], compared: Mapping[str, Columns], lead: str = "fg") -> Choice:
    """Choose a fusion by minimax regret over the kinds of rows (plain and swapped).

    The regret on a column is the gap in accuracy to the best of `compared`. A fusion that is behind `lead` on any column by more
    than one standard error and more than one point is excluded. Among the fusions within one standard error of the smallest
    maximum regret on every column, over images or groups (Breiman et al. 1984), the one with the lowest NLL is chosen. It must be
    more accurate than `lead` alone on at least one column (one-sided test at 5 %); else `lead` alone is chosen, because the
    likelihood of held-out rows that resemble the training rows rewards confidence. See `docs/method.md`, section 4.

    Args:
        fitted: candidates with their columns; should include `lead` alone, which is never excluded.
        compared: see `references`.
        lead: the reference that the chosen fusion must not fall behind.
    """
    best = {name: max(columns[name].accuracy for columns in compared.values()) for name in compared[lead]}
    regret = {n: {c: best[c] - column.accuracy for c, column in f.columns.items()} for n, f in fitted.items()}
    safe = [n for n, f in fitted.items() if not _loses(f.columns, compared[lead])]
    top = min(safe, key=lambda n: (max(regret[n].values()), _nll(fitted[n])))
    equal = [n for n in safe if _lag(fitted[top].columns, fitted[n].columns) <= 1e-9]
    alone = lead + ALONE
    ahead = [n for n in equal if alone not in safe or _gains(fitted[n].columns, fitted[alone].columns)]
    name = min(ahead, key=lambda n: (_nll(fitted[n]), fitted[n].fusion.count()), default=alone)
    points = " and ".join(f"{100 * max(r, 0):.1f} on {c} rows" for c, r in regret[name].items())
    who = ", ".join([*list(compared)[:-1]]) + f" and {list(compared)[-1]}"
    if not ahead:
        how = f"no fusion is more accurate than {lead} alone beyond chance (5 %)"
    elif len(equal) == 1:
        how = "the smallest maximum regret"
    elif len(ahead) == 1:
        how = (
            f"within one standard error of the smallest regret, and alone in being more accurate than {lead} beyond chance (5 %)"
        )
    else:
        how = f"within one standard error of the smallest regret, like {len(ahead) - 1} others, and the lowest NLL among them"
    out = f"; {len(fitted) - len(safe)} fusions are worse than {lead} alone and were excluded" if len(safe) < len(fitted) else ""
    return Choice(name, f"{name} trails the best of {who} by {points} (percentage points): {how}{out}.", regret)


def _loses(columns: Columns, lead: Columns) -> bool:
    gaps = (column.right - lead[c].right for c, column in columns.items())
    return any(float(-d.mean()) > max(float(d.std()) / len(d) ** 0.5, NEGLIGIBLE) + 1e-9 for d in gaps)


def _gains(columns: Columns, lead: Columns) -> bool:
    """Return whether accuracy rises beyond chance on any column, by a one-sided test at 5 % of the paired gains."""
    gains = (column.right - lead[c].right for c, column in columns.items())
    return any(bool(g.mean() > ONE_SIDED * g.std(correction=0) / len(g) ** 0.5) for g in gains)


def _lag(top: Columns, other: Columns) -> float:
    """Return the largest gap over the columns by which `other` trails `top`, less one standard error of the difference."""
    differences = [top[c].right - other[c].right for c in other]
    return max(float(d.mean() - d.std() / len(d) ** 0.5) for d in differences)


def _nll(candidate: Fitted) -> float:
    return sum(column.nll for column in candidate.columns.values()) / len(candidate.columns)

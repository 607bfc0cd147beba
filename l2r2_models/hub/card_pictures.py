"""The pictures of a model card, and its section on the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ..evaluate.evaluator import OWN, SHARES
from ..report.figures import home_and_away_png, risk_coverage_png
from ..views import BRANCHES
from .markdown import plain

HOME_AND_AWAY, RISK = "home_and_away.png", "risk_coverage.png"
AUDITED = {
    "accuracy": "unchanged",
    "mixed_same": "background of its class",
    "mixed_rand": "background of a random class",
    "fg_only": "background erased",
    "bg_only_mask": "object's mask erased",
    "bg_only_box": "object's box erased",
}


def is_own(row: str) -> bool:
    """Whether a row of an evaluation is one of the model's own outputs, and not a fusion for comparison."""
    return row in BRANCHES or row.startswith(OWN)


def pictures_of(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Draw the pictures that the evaluations allow, as PNG by file name; none without matplotlib.

    Args:
        evaluations: see `read_evaluations`.
    """
    if not _can_draw():
        return {}
    found, pair = {}, home_and_away_of(evaluations)
    if pair is not None:
        home, away = (one["rows"] for one in pair)
        values = {name: (home[name]["accuracy"], away[name]["accuracy"]) for name in home if name in away}
        spans = {name: (_span(home[name]), _span(away[name])) for name in values if is_own(name)}
        found[HOME_AND_AWAY] = home_and_away_png(values, spans, (pair[0]["split"], pair[1]["split"]))
    if (risky := risk_of(evaluations)) is not None:
        found[RISK] = risk_coverage_png({name: (SHARES, risks) for name, risks in risky["risk"].items()})
    return found


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def home_and_away_of(evaluations: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the evaluations of one data set with the highest and the lowest accuracy of the prediction; None without two."""
    usable = [e for e in evaluations if (own := [n for n in e["rows"] if is_own(n)]) and all(_span(e["rows"][n]) for n in own)]
    same = [e for e in usable if usable and e.get("data") == usable[0].get("data")]
    same = [e for e in same if {n for n in e["rows"] if is_own(n)} == {n for n in same[0]["rows"] if is_own(n)}]
    order = sorted(same, key=_accuracy, reverse=True)
    return (order[0], order[-1]) if len(order) > 1 else None


def risk_of(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the evaluation with the lowest accuracy that has a risk-coverage curve."""
    return min((e for e in evaluations if _has_risk(e.get("risk"))), key=_accuracy, default=None)


def _has_risk(curves: Any) -> bool:
    if not isinstance(curves, dict) or not curves:
        return False
    fits = (isinstance(risks, list) and len(risks) == len(SHARES) for risks in curves.values())
    return all(fits) and all(isinstance(v, (int, float)) for risks in curves.values() for v in risks)


def pictures_part(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Write the Markdown that shows the pictures of `pictures_of`."""
    if not _can_draw():
        return ""
    parts = []
    if (pair := home_and_away_of(evaluations)) is not None:
        home, away = (plain(one["split"]) for one in pair)
        parts.append(
            f"![Accuracy on {home} against {away}]({HOME_AND_AWAY})\n\nOn the dashed line, the accuracy is the same on both.\n"
        )
    if (risky := risk_of(evaluations)) is not None:
        text = f"Error rate on {plain(risky['split'])} if only the most confident predictions are kept"
        parts.append(f"![{text}]({RISK})\n\n{text}.\n")
    return "\n".join(parts)


def audit_part(audits: Sequence[Mapping[str, Any]]) -> str:
    """Write the section on how much the model relies on the background; empty without an audit."""
    if not audits:
        return ""
    blocks = []
    for audit in audits:
        outputs = audit["answers"]
        shown = {key: words for key, words in AUDITED.items() if any(key in found for found in outputs.values())}
        title = f"{plain(audit['data'])}, split {plain(audit['split'])}: {plain(audit['images'])} images; accuracy in %"
        lines = [f"**{title}, with 95 % confidence intervals**", "", "| | " + " | ".join(shown.values()) + " |"]
        lines.append("|---|" + "---:|" * len(shown))
        for name, found in outputs.items():
            lines.append(f"| {plain(name)} | " + " | ".join(_estimate(found.get(key)) for key in shown) + " |")
        blocks.append("\n".join([*lines, "", plain(audit.get("verdict", ""))]))
    return "## Reliance on the background\n\n" + "\n\n".join(blocks) + "\n"


def _estimate(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _accuracy(evaluation: Mapping[str, Any]) -> float:
    own = [name for name in evaluation["rows"] if is_own(name)]
    return float(evaluation["rows"][own[-1]]["accuracy"]) if own else 0.0


def _span(row: Mapping[str, Any]) -> Any:
    """Return the confidence interval of the accuracy; None without one."""
    ends = (row.get("intervals") or {}).get("accuracy")
    return tuple(ends) if isinstance(ends, (list, tuple)) and len(ends) == 2 else None

"""Comparison of the splits of one evaluation: accuracy at home against accuracy away."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluate.evaluator import Evaluation, Judged
from .figures import home_and_away
from .html import Section, percent, table


def changes(judged: Sequence[Judged], results: Sequence[Evaluation]) -> str:
    """Say how the accuracy of the run's outputs changes from the first split to each of the others."""
    home, *away = results
    sentences = []
    for result in away:
        gaps = {n: 100 * (result.rows[n]["accuracy"] - home.rows[n]["accuracy"]) for n in judged[0].own}
        (first, gap), *rest = ((n.split(":")[0], f"{gap:+.1f}".replace("-", "\u2212")) for n, gap in gaps.items())
        more = "".join(f", {gap} for {name}" for name, gap in rest)
        sentences.append(f"From {home.split} to {result.split}, the accuracy changes by {gap} points for {first}{more}.")
    return " ".join(sentences)


def compared(judged: Sequence[Judged], results: Sequence[Evaluation]) -> list[Section]:
    """Return the section that compares the splits: one picture per split after the first, and a table of all outputs."""
    home, *away = results
    names = [name for name in home.rows if all(name in result.rows for result in away)]
    own = [name for name in judged[0].own if name in names]
    blocks = []
    for result in away:
        values = {name: (home.rows[name]["accuracy"], result.rows[name]["accuracy"]) for name in names}
        spans = {name: tuple(r.rows[name]["intervals"]["accuracy"] for r in (home, result)) for name in own}
        blocks.append(home_and_away(values, spans, (home.split, result.split)))
    rows = []
    for name in names:
        metrics = [result.rows[name] for result in results]
        rows.append([name, *(percent(m["accuracy"], m["intervals"]["accuracy"]) for m in metrics)])
    text = (
        f"Accuracy on {home.split} (horizontal) against {' and '.join(r.split for r in away)} (vertical), with 95 % confidence "
        "intervals. On the dashed line, it is the same on both."
    )
    blocks.append(table(["in %", *(f"{r.split} ({r.images:,} images)" for r in results)], rows, strong=[names.index(own[-1])]))
    return [Section("Home and away", text, blocks)]

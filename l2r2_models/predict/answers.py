"""From the logits of a batch of boxes to the prediction for each box, with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ..fusion import INPUTS
from .classify import DIGITS, Answered
from .items import Job
from .prediction import Answer, ObjectPrediction, Source, why_full, why_fused
from .rules import UNKNOWN, Rules

EMPTY_MASK = "the object's mask is empty"
BEFORE = "before"  # key of the fused prediction that a prior has not corrected


def answers_of(
    answered: Answered,
    jobs: Sequence[Job],
    rules: Rules,
    top: int,
    *,
    over: Sequence[str] | None = None,
    keep_logits: bool = False,
) -> Iterator[ObjectPrediction]:
    """Yield the prediction for each box.

    Args:
        answered: logits of the boxes.
        jobs: the boxes.
        rules: class names, and the rules for naming them.
        top: number of classes listed in `ObjectPrediction.top`.
        over: the branches that are fused; None for all.
        keep_logits: whether to keep the logits of the branches.
    """
    output, has_fg, skipped = answered.output, answered.output.has_fg.tolist(), answered.skipped.tolist()
    labels, names = rules.labels, [job.pending.item.name for job in jobs]
    before = {} if rules.prior is None else {BEFORE: output.fused}
    applied = rules.applied({**output.branches(), "fused": output.fused, **before}, names)
    spread = {b: z.softmax(-1) for b, z in applied.items()}
    best = {b: p.topk(min(top, rules.count) if b == "fused" else 1) for b, p in spread.items()}
    probabilities = {b: t.values.tolist() for b, t in best.items()}
    classes = {b: t.indices.tolist() for b, t in best.items()}
    for i, row in enumerate(job.row for job in jobs):
        keep = keep_logits and has_fg[i]
        pairs = {b: zip(classes[b][i], probabilities[b][i]) for b in best if b in ("fg", "fused", BEFORE) or not skipped[i]}
        answers = {b: [Answer(labels[c], round(p, 6)) for c, p in of_branch] for b, of_branch in pairs.items()}
        first = answers.pop(BEFORE, answers["fused"])
        found = has_fg[i] and "fg" in answers
        has_box = has_fg[i] and bool(row.box.isfinite().all())
        prediction = ObjectPrediction(
            label=answers["fused"][0].label,
            score=answers["fused"][0].score,
            source="fused" if found else "full",
            reason=_reason({**answers, "fused": first}, found, over, row.why)
            + _why_prior(rules, names[i], first[0].label != answers["fused"][0].label),
            full=answers["full"][0] if "full" in answers else None,
            fg=answers["fg"][0] if found else None,
            bg=answers["bg"][0] if has_fg[i] and "bg" in answers else None,
            box=tuple(round(v, 2) for v in row.box.tolist()) if has_box else None,
            box_score=None if row.score is None else round(row.score, 4),
            top=tuple(answers["fused"]),
            box_label=row.label or None if has_box else None,
            logits={b: [round(v, DIGITS) for v in z[i].tolist()] for b, z in output.branches().items()} if keep else None,
        )
        yield named(prediction, spread["fused"][i], rules)


def _reason(answers: dict[str, list[Answer]], found: bool, over: Sequence[str] | None, why: str) -> str:
    """Explain a prediction by the branches, before a prior corrects it."""
    return why_fused(answers, over) if found else why_full(answers, why or EMPTY_MASK)


def _why_prior(rules: Rules, name: str | None, changed: bool) -> str:
    """Name the metadata that corrected the prediction for an image; empty if there is none."""
    values = () if rules.prior is None else rules.prior.about(name)
    columns = () if rules.prior is None else rules.prior.prior.columns
    known = [f"{column.name} {value}" for column, value in zip(columns, values) if value]
    return f"; {'changed' if changed else 'corrected'} by the prior for {', '.join(known)}" if known else ""


def named(answer: ObjectPrediction, probabilities: Tensor, rules: Rules) -> ObjectPrediction:
    """Name a group, or nothing, instead of a class that is not probable enough.

    Args:
        answer: prediction of a class.
        probabilities: its fused probabilities `[classes]`.
        rules: `rollup` and `abstain` are the probabilities that a class needs.
    """
    best = answer.top[0]
    if rules.abstain is not None and best.score < rules.abstain:
        reason = f"{answer.reason}; withheld, because {best.label} ({best.score:.2f}) is below {rules.abstain:.2f}"
        return replace(answer, label=UNKNOWN, source="abstained", reason=reason)
    if rules.rollup is None or best.score >= rules.rollup:
        return answer
    group, score = rules.group(probabilities)
    short = f"{answer.reason}; no class reaches {rules.rollup:g} (best {best.label}, {best.score:.2f})"
    if not score:
        return replace(answer, label=group, score=best.score, source="abstained", reason=f"{short}, and no group does")
    return replace(answer, label=group, score=round(score, 6), source="rollup", reason=f"{short}, but {group} does")


def with_fused(answer: ObjectPrediction, fused: Tensor, rules: Rules, top: int, over: Sequence[str] | None) -> ObjectPrediction:
    """Return the prediction for an object with other fused logits `[classes]`; label, score, source, reason and `top` follow."""
    probabilities = rules.restricted(fused).softmax(-1)
    best = probabilities.topk(min(top, rules.count))
    listed = tuple(Answer(rules.labels[i], round(p, 6)) for p, i in zip(best.values.tolist(), best.indices.tolist()))
    branches = {b: [one] for b in INPUTS if (one := getattr(answer, b)) is not None}
    reason = why_fused({**branches, "fused": list(listed)}, over)
    source: Source = "full" if answer.fg is None else "fused"
    again = replace(answer, label=listed[0].label, score=listed[0].score, source=source, reason=reason, top=listed)
    return named(again, probabilities, rules)

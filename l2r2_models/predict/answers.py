"""From the logits of a batch of boxes to the prediction for each box, with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ..fusion import INPUTS
from .classify import DIGITS, Answered
from .items import Job
from .prediction import Answer, ObjectPrediction, why_full, why_fused

EMPTY_MASK = "the object's mask is empty"


def answers_of(
    answered: Answered,
    jobs: Sequence[Job],
    labels: Sequence[str],
    top: int,
    *,
    over: Sequence[str] | None = None,
    keep_logits: bool = False,
) -> Iterator[ObjectPrediction]:
    """Yield the prediction for each box.

    Args:
        answered: logits of the boxes.
        jobs: the boxes.
        labels: class names.
        top: number of classes listed in `ObjectPrediction.top`.
        over: the branches that are fused; None for all.
        keep_logits: whether to keep the logits of the branches.
    """
    output, has_fg, skipped = answered.output, answered.output.has_fg.tolist(), answered.skipped.tolist()
    given = {**output.branches(), "fused": output.fused}
    best = {b: z.float().softmax(-1).topk(top if b == "fused" else 1) for b, z in given.items()}
    probabilities = {b: t.values.tolist() for b, t in best.items()}
    classes = {b: t.indices.tolist() for b, t in best.items()}
    for i, row in enumerate(job.row for job in jobs):
        keep = keep_logits and has_fg[i]
        pairs = {b: zip(classes[b][i], probabilities[b][i]) for b in best if b in ("fg", "fused") or not skipped[i]}
        answers = {b: [Answer(labels[c], round(p, 6)) for c, p in of_branch] for b, of_branch in pairs.items()}
        found = has_fg[i] and "fg" in answers
        has_box = has_fg[i] and bool(row.box.isfinite().all())
        yield ObjectPrediction(
            label=answers["fused"][0].label,
            score=answers["fused"][0].score,
            source="fused" if found else "full",
            reason=why_fused(answers, over) if found else why_full(answers, row.why or EMPTY_MASK),
            full=answers["full"][0] if "full" in answers else None,
            fg=answers["fg"][0] if found else None,
            bg=answers["bg"][0] if has_fg[i] and "bg" in answers else None,
            box=tuple(round(v, 2) for v in row.box.tolist()) if has_box else None,
            box_score=None if row.score is None else round(row.score, 4),
            top=tuple(answers["fused"]),
            box_label=row.label or None if has_box else None,
            logits={b: [round(v, DIGITS) for v in z[i].tolist()] for b, z in output.branches().items()} if keep else None,
        )


def with_fused(
    answer: ObjectPrediction, fused: Tensor, labels: Sequence[str], top: int, over: Sequence[str] | None
) -> ObjectPrediction:
    """Return the prediction for an object with other fused logits `[classes]`; label, score, reason and `top` follow."""
    best = fused.softmax(-1).topk(top)
    listed = tuple(Answer(labels[i], round(p, 6)) for p, i in zip(best.values.tolist(), best.indices.tolist()))
    branches = {b: [one] for b in INPUTS if (one := getattr(answer, b)) is not None}
    reason = why_fused({**branches, "fused": list(listed)}, over)
    return replace(answer, label=listed[0].label, score=listed[0].score, reason=reason, top=listed)

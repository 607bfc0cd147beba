"""Predictions by `topk_prompts`: the classes that the whole image suggests are what the localizer is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..localize import Localizer
from ..models.l2r2 import L2R2
from .finite import checked
from .items import Item, whole_images
from .prediction import Answer, ObjectPrediction, Prediction


def ask(
    items: Sequence[Item], model: L2R2, labels: Sequence[str], localizer: Localizer, count: int, threshold: float, top: int
) -> list[Item | Prediction]:
    """Predict a batch of images, with an item for each that the full branch is to answer.

    Args:
        items: with whole images.
        model, labels: what predicts.
        localizer: takes prompts.
        count: classes to ask for.
        threshold: boxes with a lower score count as not found.
        top: classes listed.
    """
    from ..localize.topk import check_promptable, topk_prompts

    images = whole_images(items)
    try:
        found = topk_prompts(model, labels, check_promptable(localizer, model), images, count, threshold)
    except (L2R2Error, RuntimeError) as error:
        if len(items) == 1:
            return [replace(items[0], localizer_failure=" ".join(str(error).split())[:300])]
        return [answer for item in items for answer in ask([item], model, labels, localizer, count, threshold, top)]
    answers: list[Item | Prediction] = []
    for i, item in enumerate(items):
        if not bool(found.boxes[i].isfinite().any()):
            answers.append(replace(item, boxes=Detections.from_lists([], (images[i].height, images[i].width))))
            continue
        parts, order = found.scores[i].softmax(0).tolist(), found.scores[i].argsort(descending=True).tolist()
        best, has_box = order[0], bool(found.boxes[i, order[0]].isfinite().all())
        listed = tuple(Answer(labels[int(found.classes[i, j])], round(parts[j], 6)) for j in order[:top])
        said = {b: answer_of(z[i] if b == "full" else z[i, best], labels) for b, z in found.branches.items()}
        answer = ObjectPrediction(
            label=listed[0].label,
            score=listed[0].score,
            source="fused" if has_box else "full",
            reason=f"the best of the {len(order)} classes that the whole image suggests"
            + ("" if has_box else "; it was not found, the whole image stands for it"),
            full=said["full"],
            fg=said["fg"] if has_box else None,
            bg=said.get("bg") if has_box else None,
            box=tuple(round(v, 2) for v in found.boxes[i, best].tolist()) if has_box else None,  # type: ignore[arg-type]
            box_score=round(float(found.box_scores[i, best]), 4) if has_box else None,
            top=listed,
        )
        answers += checked([Prediction(item.name, (answer,))])
    return answers


def answer_of(logits: Tensor, labels: Sequence[str]) -> Answer:
    """The class that logits `[classes]` say."""
    score, index = logits.float().softmax(-1).max(-1)
    return Answer(labels[int(index)], round(float(score), 6))

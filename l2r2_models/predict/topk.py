"""Predictions with `topk_prompts`: the localizer is prompted with the classes that the whole image suggests."""

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


def predict_topk(
    items: Sequence[Item], model: L2R2, labels: Sequence[str], localizer: Localizer, count: int, threshold: float, top: int
) -> list[Item | Prediction]:
    """Predict images; one in which no prompted class is found is returned as an item, for the full branch.

    Args:
        items: decoded whole images.
        model: classifies the images.
        labels: class names of the model.
        localizer: a localizer that takes prompts.
        count: number of classes to prompt with.
        threshold: boxes with a lower score count as not found.
        top: number of classes listed in `ObjectPrediction.top`.
    """
    from ..localize.topk import check_promptable, topk_prompts

    images = whole_images(items)
    try:
        found = topk_prompts(model, labels, check_promptable(localizer, model), images, count, threshold)
    except (L2R2Error, RuntimeError) as error:
        if len(items) == 1:
            return [replace(items[0], localizer_failure=" ".join(str(error).split())[:300])]
        return [answer for item in items for answer in predict_topk([item], model, labels, localizer, count, threshold, top)]
    predictions: list[Item | Prediction] = []
    for i, item in enumerate(items):
        if not bool(found.boxes[i].isfinite().any()):
            predictions.append(replace(item, boxes=Detections.from_lists([], (images[i].height, images[i].width))))
            continue
        parts, order = found.scores[i].softmax(0).tolist(), found.scores[i].argsort(descending=True).tolist()
        best, has_box = order[0], bool(found.boxes[i, order[0]].isfinite().all())
        listed = tuple(Answer(labels[int(found.classes[i, j])], round(parts[j], 6)) for j in order[:top])
        answers = {b: _answer(z[i] if b == "full" else z[i, best], labels) for b, z in found.branches.items()}
        prediction = ObjectPrediction(
            label=listed[0].label,
            score=listed[0].score,
            source="fused" if has_box else "full",
            reason=f"the best of the {len(order)} classes suggested by the whole image"
            + ("" if has_box else "; it was not found, so its score is from the whole image"),
            full=answers["full"],
            fg=answers["fg"] if has_box else None,
            bg=answers.get("bg") if has_box else None,
            box=tuple(round(v, 2) for v in found.boxes[i, best].tolist()) if has_box else None,
            box_score=round(float(found.box_scores[i, best]), 4) if has_box else None,
            top=listed,
        )
        predictions += checked([Prediction(item.name, (prediction,), size=(images[i].height, images[i].width))])
    return predictions


def _answer(logits: Tensor, labels: Sequence[str]) -> Answer:
    score, index = logits.float().softmax(-1).max(-1)
    return Answer(labels[int(index)], round(float(score), 6))

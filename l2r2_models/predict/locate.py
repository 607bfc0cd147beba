"""Boxes for the images that come without any: the localizer of a `Predictor`, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ..errors import L2R2Error
from ..localize import Localizer
from ..localize.model_based import Head, SegmentationHead
from ..models.l2r2 import L2R2
from ..views import make_views
from .items import Item, is_large, whole_images
from .prediction import Prediction
from .topk import predict_topk


class Localizing(Protocol):
    """What this module uses of a `Predictor`."""

    model: L2R2
    labels: tuple[str, ...]
    device: torch.device
    localizer: Localizer | None
    topk_prompts: int | None
    box_threshold: float
    batch_size: int
    top: int
    image_rule: str


def lacks_boxes(predictor: Localizing, item: Item) -> bool:
    """Return whether the predictor's localizer must find the boxes of an item."""
    return predictor.localizer is not None and item.boxes is None and item.localizer_failure is None


def located(predictor: Localizing, items: Iterable[Item | Prediction]) -> Iterator[Item | Prediction]:
    """Yield the items; those without boxes are localized, one batch at a time."""
    held: list[Item | Prediction] = []
    for item in items:
        held.append(item)
        if len(held) >= predictor.batch_size or is_large(item for item in held if isinstance(item, Item)):
            yield from _with_boxes(predictor, held)
            held = []
    yield from _with_boxes(predictor, held)


def _with_boxes(predictor: Localizing, held: Sequence[Item | Prediction]) -> list[Item | Prediction]:
    lacking = [item for item in held if isinstance(item, Item) and lacks_boxes(predictor, item)]
    if not lacking or predictor.localizer is None:
        return list(held)
    found: Iterator[Item | Prediction]
    if predictor.topk_prompts is None:
        found = iter(localized(predictor, lacking))
    else:
        args = predictor.model, predictor.labels, predictor.localizer, predictor.topk_prompts, predictor.box_threshold
        tried = predict_topk(lacking, *args, predictor.top)
        found = (replace(t, rule=predictor.image_rule) if isinstance(t, Prediction) else t for t in tried)
    return [next(found) if isinstance(item, Item) and lacks_boxes(predictor, item) else item for item in held]


def localized(predictor: Localizing, items: Sequence[Item]) -> list[Item]:
    """Return the items with their boxes; if the localizer fails on a batch, each image is tried alone."""
    localizer, model, device = predictor.localizer, predictor.model, predictor.device
    assert localizer is not None
    images, names = whole_images(items), [item.name or "" for item in items]
    try:
        if isinstance(localizer, (Head, SegmentationHead)) and localizer.model is model:
            full = make_views(images, None, model.view_spec, branches=("full",), device=device).full
            out = model.forward_views(full=full)
            boxes = localizer.of_output(out, images)
            return [replace(item, boxes=d, full=z) for item, d, z in zip(items, boxes, out.full)]
        found = localizer(images, names=names if all(names) else None)
        return [replace(item, boxes=detections) for item, detections in zip(items, found)]
    except (L2R2Error, RuntimeError) as error:
        if len(items) == 1:
            return [replace(items[0], localizer_failure=" ".join(str(error).split())[:300])]
    return [found for item in items for found in localized(predictor, [item])]

"""The object of an image whose prediction is explained, as a `Subject` of the audit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..audit.perturbations import Subject
from ..audit.samples import shrunk
from ..boxes.detections import Detections
from ..predict.prediction import ObjectPrediction
from ..predict.predictor import Boxes


def given_boxes(boxes: Boxes | None, mask: Tensor | None, size: tuple[int, int]) -> Detections | None:
    """Return the usable boxes, best first, of an image whose network does not use boxes."""
    if boxes is None:
        found = Detections.from_mask(mask) if mask is not None else Detections.from_lists([], size)
    else:
        found = boxes if isinstance(boxes, Detections) else Detections.from_lists(boxes, size)
    usable = found.usable().sorted()
    if usable.masks is None and mask is not None:
        usable = replace(usable, masks=mask.expand(len(usable), -1, -1))
    return usable if len(usable) else None


def subject_of(key: str, pixels: Tensor, found: Detections | None, predicted: ObjectPrediction) -> Subject | None:
    """Return the image as a `Subject` with the predicted object first; None without an object."""
    if found is None or (found.masks is not None and not found.masks.any()):
        return None
    first = 0
    if predicted.box is not None:
        first = int((found.boxes - torch.tensor(predicted.box)).abs().sum(1).argmin())
    order = torch.tensor([first, *(i for i in range(len(found)) if i != first)])
    found = found.select(order)
    masks = found.masks
    if masks is not None and not masks[0].any():
        return None
    return Subject(key, pixels, found.boxes.clone(), None if masks is None else masks.any(0), None if masks is None else masks[0])


def on_small(subject: Subject | None, key: str, pixels: Tensor) -> Subject:
    """Return the subject with at most 2 megapixels; without an object, its box is NaN."""
    return shrunk(subject or Subject(key, pixels, torch.full((1, 4), torch.nan), None, None))


def inside_of(subject: Subject) -> Tensor:
    """Return a mask `[H, W]` bool of the explained object, or of its box."""
    if subject.view_mask is not None:
        return subject.view_mask
    return replace(subject, boxes=subject.boxes[:1], mask=None).in_boxes

"""The trained box head as a localizer: `head:RUN`, or `head` for the model that predicts (see `box_head`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..models.box_head import FoundBoxes
from ..views import ViewSpec, view_map
from .base import Context, Spec, size_of
from .model_based import Looking, one_box


class Head(Looking):
    """One box an image; its score is the objectness, so that a threshold can refuse it."""

    name = "head"
    source = "a run that was trained with `l2r2 finetune --box-head`"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        if self.model.box_head is None:
            raise L2R2Error(f"{self.checkpoint.name}: has no box head; train one with `l2r2 finetune --box-head`.")

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        views, _ = self.full_views(images)
        return detections_of(self.model.locate(views), images, self.model.view_spec)


def detections_of(found: FoundBoxes, images: Sequence[Image], spec: ViewSpec) -> list[Detections]:
    """What a box head found in the full views of images, in pixels of each image.

    Raises:
        L2R2Error: a box or score is not finite.
    """
    boxes, scores = found.in_pixels(spec.size, spec.size, 0.0).cpu(), found.objectness.float().sigmoid().tolist()
    if not bool(boxes.isfinite().all()):
        raise L2R2Error("the box head gives numbers that are not finite; its training has diverged.")
    maps = [view_map("full", spec, size_of(image)) for image in images]
    return [one_box(m.boxes_to_image(box), score, image) for m, box, score, image in zip(maps, boxes, scores, images)]

"""Localizers that look with a checkpoint's own network: its box head, and the parts of an ifam model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..boxes.detections import Detections, ViewMap
from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..errors import L2R2Error
from ..models.box_head import FoundBoxes
from ..views import ViewSpec, make_views
from .base import Context, Localizer, LocalizerSpec
from .regions import box_of, largest_region, one_box


class ModelLocalizer(Localizer):
    """A localizer with a checkpoint: the source, or without one the checkpoint it was made for."""

    source = "a run or a Hub id"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self.checkpoint: Checkpoint = load_checkpoint(spec.source) if spec.source else context.checkpoint  # type: ignore[assignment]
        self.model = self.checkpoint.model.to(context.device).eval()

    @property
    def weights(self) -> str | None:
        return self.checkpoint.digest

    def full_views(self, images: Sequence[Image], size: int | None = None) -> tuple[Tensor, list[ViewMap]]:
        """Full views `[B, 3, S, S]` of the model's own kind, and how each maps back to its image."""
        spec = self.model.view_spec
        spec = spec if size is None else ViewSpec.from_dict({**spec.to_dict(), "size": size})
        views = make_views(images, None, spec, branches=("full",), device=self.context.device)
        assert views.full is not None
        return views.full, [full_view_map(image, spec) for image in images]


def full_view_map(image: Image, spec: ViewSpec) -> ViewMap:
    """Where the full view of an image comes from."""
    return ViewMap((0, 0, image.width, image.height), (spec.size, spec.size), spec.square)


class Head(ModelLocalizer):
    """One box an image; its score is the objectness, so that a threshold can refuse it."""

    name = "head"
    source = "a run that was trained with `l2r2 finetune --box-head`"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
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
    maps = [full_view_map(image, spec) for image in images]
    return [one_box(m.boxes_to_image(box), score, image) for m, box, score, image in zip(maps, boxes, scores, images)]


class Parts(ModelLocalizer):
    """What stage 1 of an ifam model keeps: its largest region gives the box, all of it the mask."""

    name = "parts"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if not self.model.finds_object:
            raise L2R2Error(f"{self.checkpoint.name}: finds no parts; that is what the ifam models do.")

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        views, maps = self.full_views(images)
        kept = self.model.find_parts(views).keep.cpu()  # type: ignore[operator]
        found = []
        for image, view, keep in zip(images, maps, kept):
            box = box_of(largest_region(keep, keep.float()), (0, 0), keep.shape, view, image)
            mask = view.map_to_image(keep, (image.height, image.width)) > 0.5
            found.append(replace(box, masks=mask[None]) if len(box) else box)
        return found

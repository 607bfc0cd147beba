"""Localizers that use a checkpoint's own network: its box head or mask head, or the parts of an iFAM model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..boxes.detections import Detections, ViewMap
from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..errors import L2R2Error
from ..models.box_head import FoundBoxes
from ..models.l2r2 import L2R2Output
from ..views import ViewSpec, make_views, view_map
from .base import Context, Localizer, LocalizerSpec, Option, number, size_of
from .regions import box_of, inside_view, largest_region, one_box


class ModelLocalizer(Localizer):
    """Base class of localizers that run a checkpoint: the spec's source, or the checkpoint given to `create_localizer`."""

    source = "a run or a Hub id"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self.checkpoint: Checkpoint = load_checkpoint(spec.source) if spec.source else context.checkpoint  # type: ignore[assignment]
        self.model = self.checkpoint.model.to(context.device).eval()

    @property
    def weights(self) -> str | None:
        """Digest of the checkpoint's weights."""
        return self.checkpoint.digest

    def full_views(self, images: Sequence[Image], size: int | None = None) -> tuple[Tensor, list[ViewMap]]:
        """Cut the full views of images as the model expects them; square ones where it takes any aspect ratio.

        Args:
            images: B images.
            size: side S of the views; defaults to that of the model's full view.

        Returns:
            Views `[B, 3, S, S]`, and for each the mapping back to its image.
        """
        spec = self.model.view_spec
        if spec.patch:
            spec = replace(spec, patch=0, square=True)
        spec = spec if size is None else replace(spec, size=size, sizes={})
        views = make_views(images, None, spec, branches=("full",), device=self.context.device)
        assert views.full is not None
        return views.full, [view_map("full", spec, size_of(image)) for image in images]


class Head(ModelLocalizer):
    """The box head of a checkpoint: one box per image, whose score is the objectness."""

    name = "head"
    source = "a run trained with `l2r2 finetune --box-head`"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if self.model.box_head is None:
            raise L2R2Error(f"{self.checkpoint.name}: has no box head; train one with `l2r2 finetune --box-head`.")

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Predict one box per image."""
        views, _ = self.full_views(images)
        return detections_of(self.model.locate(views), images, self.model.view_spec)

    def of_output(self, out: L2R2Output, images: Sequence[Image]) -> list[Detections]:
        """Return what `find` does, from a pass over the full views that was made anyway."""
        assert out.located is not None
        return detections_of(out.located, images, self.model.view_spec)


class SegmentationHead(ModelLocalizer):
    """The mask head of a checkpoint: one mask per image, and the box of its largest region.

    The score is the mean probability inside that region. An image without a pixel above the level has no box.

    Options: `level` (the probability from which a pixel belongs to the object).
    """

    name = "mask-head"
    source = "a run trained with `l2r2 finetune --mask-head`"
    known_options: ClassVar = {"level": Option(number(0, 1), 0.5, "a number between 0 and 1")}

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if self.model.mask_head is None:
            raise L2R2Error(f"{self.checkpoint.name}: has no mask head; train one with `l2r2 finetune --mask-head`.")

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Predict the mask of each image; one box with its mask, or none."""
        views, _ = self.full_views(images)
        return self._detections(self.model.segment(views), images)

    def of_output(self, out: L2R2Output, images: Sequence[Image]) -> list[Detections]:
        """Return what `find` does, from a pass over the full views that was made anyway."""
        assert out.masks is not None
        return self._detections(out.masks, images)

    def _detections(self, logits: Tensor, images: Sequence[Image]) -> list[Detections]:
        if not bool(logits.isfinite().all()):
            raise L2R2Error("the masks of the mask head are not finite; its training has diverged.")
        spec, size = self.model.view_spec, self.model.view_spec.size_of("full")
        maps = interpolate(logits.float().sigmoid()[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0].cpu()
        return [self._one(map, view_map("full", spec, size_of(image)), image) for map, image in zip(maps, images)]

    def _one(self, probability: Tensor, view: ViewMap, image: Image) -> Detections:
        (top, bottom), (left, right) = inside_view(view, image, probability.shape)
        part = probability[top:bottom, left:right]
        region = largest_region(part > self.options["level"], part)
        box = box_of(region, (top, left), probability.shape, view, image)
        if not len(box):
            return box
        mask = view.map_to_image(probability, size_of(image)) > self.options["level"]
        return replace(box, scores=part[region].mean()[None], masks=mask[None])


def detections_of(found: FoundBoxes, images: Sequence[Image], spec: ViewSpec) -> list[Detections]:
    """Map what a box head found in full views back to the images.

    Args:
        found: boxes and objectness of B views.
        images: the B images.
        spec: how the views were cut.

    Returns:
        One box per image, in pixels of that image.

    Raises:
        L2R2Error: when a box is not finite.
    """
    size = spec.size_of("full")
    boxes, scores = found.in_pixels(size, size, 0.0).cpu(), found.objectness.float().sigmoid().tolist()
    if not bool(boxes.isfinite().all()):
        raise L2R2Error("the boxes of the box head are not finite; its training has diverged.")
    maps = [view_map("full", spec, size_of(image)) for image in images]
    return [one_box(m.boxes_to_image(box), score, image) for m, box, score, image in zip(maps, boxes, scores, images)]


class Parts(ModelLocalizer):
    """The patches that stage 1 of an iFAM model keeps: all of them are the mask, their largest region gives the box."""

    name = "parts"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if not self.model.finds_object:
            raise L2R2Error(f"{self.checkpoint.name}: finds no parts; use an iFAM model, see `l2r2 list`.")

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Find the kept patches of each image; one box with its mask, or none."""
        views, maps = self.full_views(images)
        kept = self.model.find_parts(views).keep.cpu()  # type: ignore[operator]
        found = []
        for image, view, keep in zip(images, maps, kept):
            box = box_of(largest_region(keep, keep.float()), (0, 0), keep.shape, view, image)
            mask = view.map_to_image(keep, (image.height, image.width)) > 0.5
            found.append(replace(box, masks=mask[None]) if len(box) else box)
        return found

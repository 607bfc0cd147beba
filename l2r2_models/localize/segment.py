"""Masks for the boxes of any localizer: SAM, SAM2 or EdgeTAM prompted with each box, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..pretrained import load_pretrained
from .base import Context, Localizer

# kind -> transformers classes and accepted model types (the published configs of SAM2 and EdgeTAM are of their video models)
KINDS = {
    "sam": (("SamModel", "SamProcessor"), ("sam",)),
    "sam2": (("Sam2Model", "Sam2Processor"), ("sam2", "sam2_video")),
    "edgetam": (("EdgeTamModel", "Sam2Processor"), ("edgetam", "edgetam_video")),
}


class Segmenter:
    """Adds a mask to every box: `segmenter(images, detections) -> list[Detections]`; images without a box are skipped."""

    def __init__(self, text: str, device: torch.device) -> None:
        kind, _, source = text.partition(":")
        if kind not in KINDS or not source:
            raise L2R2Error(f'Masks come from sam:SOURCE, sam2:SOURCE or edgetam:SOURCE (a Hub id or folder), got "{text}".')
        self.device = device
        self.network = load_pretrained(source, *KINDS[kind], "float32", device)

    def __call__(self, images: Sequence[Image], found: Sequence[Detections]) -> list[Detections]:
        """Segment each box; the masks are `[N, H, W]` bool."""
        return [self._one(image, detections) for image, detections in zip(images, found)]

    @torch.inference_mode()
    def _one(self, image: Image, found: Detections) -> Detections:
        if not len(found):
            return found
        processor = self.network.processor
        inputs = processor(images=image, input_boxes=[found.boxes.tolist()], return_tensors="pt").to(self.device)
        sizes = {key: inputs.pop(key).cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        out = self.network.model(**inputs, multimask_output=False)  # a box prompt is not ambiguous
        if not bool(out.pred_masks.isfinite().all()):
            raise L2R2Error("the masks of the segmenter are not finite; check its weights.")
        masks = processor.post_process_masks(out.pred_masks.cpu(), **sizes)[0]  # [N, 1, H, W] bool
        return replace(found, masks=masks[:, 0].bool())


class Masked(Localizer):
    """Any localizer with the option `masks=sam:SOURCE`, `masks=sam2:SOURCE` or `masks=edgetam:SOURCE`."""

    def __init__(self, inner: Localizer, masks: str, context: Context) -> None:
        self.inner, self.segmenter = inner, Segmenter(masks, context.device)
        self.context, self.options = context, {**inner.options, "masks": masks}
        self.spec = inner.spec.with_option("masks", masks)
        self.prompted = inner.prompted  # type: ignore[misc]

    @property
    def lacks_prompt(self) -> bool:
        """Whether the inner localizer lacks a prompt."""
        return self.inner.lacks_prompt

    @property
    def weights(self) -> str | None:
        """Digests of the localizer and the segmenter."""
        return "+".join(str(digest) for digest in (self.inner.weights, self.segmenter.network.digest))

    def about(self, name: str) -> str | None:
        """As for the inner localizer."""
        return self.inner.about(name)

    @property
    def info(self) -> dict[str, Any]:
        """As for the inner localizer, with this spec and these weights, and without the license of the boxes' weights alone."""
        return {**{k: v for k, v in self.inner.info.items() if k != "license"}, **super().info}

    def find(self, images: list[Image], names: Sequence[str] | None, prompts: Sequence[str] | None) -> list[Detections]:
        """Find boxes with the inner localizer, then their masks."""
        return self.segmenter(images, self.inner.find(images, names, prompts))

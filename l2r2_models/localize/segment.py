"""Masks for the boxes of any localizer: SAM and SAM2 prompted with each box (METHOD.md 6), through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image

from ..boxes.detections import Detections
from ..errors import L2R2Error
from .base import Context, Localizer
from .pretrained import load_pretrained

# kind -> transformers' classes and what the config may call itself (SAM2's published configs are those of its video model)
KINDS = {
    "sam": (("SamModel", "SamProcessor"), ("sam",)),
    "sam2": (("Sam2Model", "Sam2Processor"), ("sam2", "sam2_video")),
}


class Segmenter:
    """`segmenter(images, detections)` adds a mask to every box; an image without a box is not looked at."""

    def __init__(self, text: str, device: torch.device) -> None:
        kind, _, source = text.partition(":")
        if kind not in KINDS or not source:
            raise L2R2Error(f'Masks come from sam:SOURCE or sam2:SOURCE (a hub id or folder), not from "{text}".')
        self.device = device
        self.network = load_pretrained(source, *KINDS[kind], "float32", device)

    def __call__(self, images: Sequence[Image], found: Sequence[Detections]) -> list[Detections]:
        return [self._one(image, detections) for image, detections in zip(images, found)]

    @torch.inference_mode()
    def _one(self, image: Image, found: Detections) -> Detections:
        if not len(found):
            return found
        processor = self.network.processor
        inputs = processor(images=image, input_boxes=[found.boxes.tolist()], return_tensors="pt").to(self.device)
        sizes = {key: inputs.pop(key).cpu() for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        out = self.network.model(**inputs, multimask_output=False)  # a box leaves no doubt about which part is meant
        if not bool(out.pred_masks.isfinite().all()):
            raise L2R2Error("the segmenter gives masks that are not finite; its weights are damaged.")
        masks = processor.post_process_masks(out.pred_masks.cpu(), **sizes)[0]  # [N, 1, H, W] bool
        return replace(found, masks=masks[:, 0].bool())


class Masked(Localizer):
    """Another localizer with the option `masks=sam:SOURCE` or `masks=sam2:SOURCE`."""

    def __init__(self, inner: Localizer, masks: str, context: Context) -> None:
        self.inner, self.segmenter = inner, Segmenter(masks, context.device)
        self.context, self.options = context, {**inner.options, "masks": masks}
        self.spec = inner.spec.with_option("masks", masks)
        self.prompted = inner.prompted  # type: ignore[misc]

    @property
    def lacks_prompt(self) -> bool:
        return self.inner.lacks_prompt

    @property
    def weights(self) -> str | None:
        return "+".join(str(digest) for digest in (self.inner.weights, self.segmenter.network.digest))

    def about(self, name: str) -> str | None:
        return self.inner.about(name)

    @property
    def info(self) -> dict[str, Any]:
        return {**self.inner.info, **super().info}

    def find(self, images: list[Image], names: Sequence[str] | None, prompts: Sequence[str] | None) -> list[Detections]:
        return self.segmenter(images, self.inner.find(images, names, prompts))

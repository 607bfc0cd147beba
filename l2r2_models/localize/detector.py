"""Detectors with a fixed set of classes: RF-DETR, D-FINE, DEIMv2, RT-DETR and the other DETRs of transformers."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.ops import box_convert

from ..boxes.detections import Detections
from ..errors import L2R2Error
from .base import Context, LocalizerSpec, Option, number
from .network import LIMITS, PART, NetworkLocalizer

SOFTMAX = ("detr", "table-transformer", "yolos")  # the last class is "no object"
SIGMOID = (
    "conditional_detr",
    "d_fine",
    "dab-detr",
    "deformable_detr",
    "deimv2",
    "lw_detr",
    "rf_detr",
    "rt_detr",
    "rt_detr_v2",
)


def split_names(text: str) -> tuple[str, ...]:
    """Split names at the commas; raises ValueError if one is empty."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(text)
    return names


class Detector(NetworkLocalizer):
    """A detector with a fixed set of classes, such as the 80 of COCO.

    The score of a box is that of its best class. `classes=bird,dog` takes the best of these classes only; without the option, any
    object counts. Upper and lower case do not matter.

    Options: those of `NetworkLocalizer`, and `classes`.
    """

    name = "detr"
    auto_classes = ("AutoModelForObjectDetection", "AutoImageProcessor")
    model_types = (*SIGMOID, *SOFTMAX)
    known_options: ClassVar = {
        "classes": Option(split_names, (), "names of the detector's classes, separated by commas"),
        **LIMITS,
        "threshold": Option(number(0, 1), 0.25, PART),
    }

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self.load()
        if not getattr(self.network.model.config, "use_focal_loss", True):
            raise L2R2Error(f"{self.spec.source}: was trained without focal loss, which is not supported; use another detector.")
        self.names: dict[int, str] = self.network.model.config.id2label
        self.wanted = self._wanted()

    def _wanted(self) -> list[int]:
        """The indices of the classes that count; empty if all do."""
        by_name: dict[str, list[int]] = {}
        for index, name in self.names.items():
            by_name.setdefault(name.casefold(), []).append(index)
        for name in self.options["classes"]:
            if name.casefold() not in by_name:
                close = get_close_matches(name.casefold(), by_name, 3, 0.5)
                what, found = ("close matches", close) if close else ("its classes are", list(by_name))
                shown = ", ".join(self.names[by_name[key][0]] for key in found[:20]) + (", ..." if len(found) > 20 else "")
                raise L2R2Error(f'{self.spec.source}: the detector has no class "{name}"; {what}: {shown}.')
        return sorted({index for name in self.options["classes"] for index in by_name[name.casefold()]})

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Detect in images together where the processor makes them one size: padding would change the predictions."""
        inputs = [self.network.processor(images=image, return_tensors="pt") for image in images]
        by_size: dict[torch.Size, list[int]] = {}
        for i, each in enumerate(inputs):
            by_size.setdefault(each["pixel_values"].shape, []).append(i)
        found: dict[int, Detections] = {}
        for same in by_size.values():
            batch = {key: torch.cat([inputs[i][key] for i in same]).to(self.context.device) for key in inputs[same[0]]}
            batch["pixel_values"] = batch["pixel_values"].to(self.network.model.dtype)
            out = self.network.model(**batch)
            boxes = box_convert(out.pred_boxes.float(), "cxcywh", "xyxy").cpu()
            for i, of_image, logits in zip(same, boxes, out.logits.float().cpu()):
                found[i] = self._boxes(of_image, logits, images[i])
        return [found[i] for i in range(len(images))]

    def _boxes(self, boxes: Tensor, logits: Tensor, image: Image) -> Detections:
        """Postprocess the boxes `[Q, 4]` (shares of width and height) and logits `[Q, C]` of an image."""
        softmax = self.network.model.config.model_type in SOFTMAX
        scores = logits.softmax(-1)[:, :-1] if softmax else logits.sigmoid()
        wanted = self.wanted or list(range(scores.shape[1]))
        best, which = scores[:, wanted].max(-1)
        labels = [self.names.get(wanted[j], "") for j in which.tolist()]
        return self.tidy(boxes * torch.tensor(image.size).repeat(2), best, image, labels)

"""The base class of localizers that run a detector of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from PIL.Image import Image
from torch import Tensor

from ..boxes.detections import Detections
from ..pretrained import DTYPES, Pretrained, load_pretrained
from .base import Localizer, Option, number, one_of, size_of, tidy, whole

PART = "a number between 0 and 1"
LIMITS = {
    "threshold": Option(number(0, 1), 0.1, PART),
    "nms": Option(number(0, 1), 0.5, PART),
    "max_boxes": Option(whole(1, 1000), 10, "a whole number from 1 to 1000"),
    "dtype": Option(one_of(*DTYPES), "float32", "one of " + ", ".join(DTYPES)),
}


class NetworkLocalizer(Localizer):
    """Base class of the detectors of transformers: loads the network, postprocesses raw boxes.

    Options: `threshold` (lowest score, if there are scores), `nms` (highest IoU of two boxes), `max_boxes` (per image), `dtype`.
    """

    source = "a Hub id or the folder of a model"
    known_options: ClassVar = LIMITS
    auto_classes: ClassVar[tuple[str, str]]  # of the model and its processor
    model_types: ClassVar[tuple[str, ...]]
    gated: ClassVar[bool] = False  # whether the Hub asks to accept a license first
    network: Pretrained

    def load(self) -> None:
        """Load the network that the spec names."""
        self.network = load_pretrained(
            self.spec.source,
            self.auto_classes,
            self.model_types,
            self.options["dtype"],
            self.context.device,
            gated=self.gated,
        )

    @property
    def weights(self) -> str | None:
        """Digest of the detector's weights."""
        return self.network.digest

    def tidy(self, boxes: Tensor, scores: Tensor, image: Image, labels: Sequence[str], masks: Tensor | None = None) -> Detections:
        """Apply `localize.base.tidy` with the limits of the options."""
        limits = {
            "threshold": self.options.get("threshold", 0.0),
            "nms_iou": self.options["nms"],
            "max_boxes": self.options["max_boxes"],
        }
        return tidy(boxes, scores, size_of(image), labels, masks, **limits)

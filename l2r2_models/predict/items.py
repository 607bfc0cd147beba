"""Images and boxes on their way through the predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..boxes.detections import Detections
from ..views import Patches, Views
from .prediction import ObjectPrediction

BATCH_PIXELS = 50_000_000  # held at once: about 150 MB


@dataclass(frozen=True)
class Item:
    """One image on its way through the predictor.

    Attributes:
        name: of its file.
        image: its pixels, or those that its views show; None once these are cut.
        boxes: what was found or given.
        localizer_failure: why the localizer found nothing.
        mask: `[H, W]` bool of the object, for boxes that bring none.
        full: logits of the full branch, where the pass that found the box gave them.
        views: cut by the thread that decoded the image: full `[1, 3, S, S]`, the others and `has_fg` one per box.
    """

    name: str | None
    image: Image.Image | Patches | None
    boxes: Detections | None
    localizer_failure: str | None = None
    mask: Tensor | None = None
    full: Tensor | None = None
    views: Views | None = None

    @property
    def pixels(self) -> int:
        """The number of uint8 RGB pixels that take as much memory as what is held of the image."""
        cut = () if self.views is None else (self.views.full, self.views.fg, self.views.bg)
        held = sum(4 * view.numel() // 3 for view in cut if view is not None)
        if self.image is None:
            return held
        return held + (self.image.pixels if isinstance(self.image, Patches) else self.image.width * self.image.height)


class Row(NamedTuple):
    """One box to classify; NaN where there is none, and why."""

    box: Tensor
    score: float | None
    why: str
    mask: Tensor | None


@dataclass
class Pending:
    """An image whose boxes are being classified."""

    item: Item
    rows: Sequence[Row]
    answers: list[ObjectPrediction | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.rows)

    @property
    def objects(self) -> tuple[ObjectPrediction, ...] | None:
        """The answers; None while one is missing."""
        found = tuple(answer for answer in self.answers if answer is not None)
        return found if len(found) == len(self.rows) else None

    def know(self, full: Tensor) -> None:
        """Keep the full branch's logits `[classes]` for the boxes to come."""
        self.item = replace(self.item, full=full)


class Job(NamedTuple):
    """One box of an image that is to be classified."""

    pending: Pending
    number: int

    @property
    def row(self) -> Row:
        """The box."""
        return self.pending.rows[self.number]


def is_large(items: Sequence[Item]) -> bool:
    """Whether images are to be worked on before the next one is decoded."""
    return sum(item.pixels for item in items) > BATCH_PIXELS


def whole_images(items: Sequence[Item]) -> list[Image.Image]:
    """The images of items that were decoded whole, for a localizer."""
    return [item.image for item in items if isinstance(item.image, Image.Image)]

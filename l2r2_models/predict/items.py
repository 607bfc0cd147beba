"""The images and boxes that the predictor passes between its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..boxes.detections import Detections
from ..views import Patches, Views
from .prediction import ObjectPrediction, Prediction

BATCH_PIXELS = 50_000_000  # maximum number of pixels held in memory, about 150 MB


@dataclass(frozen=True, eq=False)  # two images are never the same one, even if they look alike
class Item:
    """One image with its boxes, before it is classified.

    Attributes:
        name: file name.
        image: the decoded image, or the patches that its views show; None once the views are cut.
        boxes: the given or located boxes.
        localizer_failure: why the localizer failed.
        mask: `[H, W]` bool of the object, for boxes without masks.
        full: logits of the full branch, if finding the box already computed them.
        views: the views, if already cut: full is `[1, 3, S, S]`, the others and `has_fg` have one row per box.
        size: `(height, width)` of the upright image.
        rows: the boxes to classify, once they are selected.
    """

    name: str | None
    image: Image.Image | Patches | None
    boxes: Detections | None
    localizer_failure: str | None = None
    mask: Tensor | None = None
    full: Tensor | None = None
    views: Views | None = None
    size: tuple[int, int] | None = None
    rows: Sequence[Row] | None = None

    @property
    def pixels(self) -> int:
        """The number of uint8 RGB pixels that would take as much memory as this item."""
        views = () if self.views is None else (self.views.full, self.views.fg, self.views.bg)
        masks = (self.mask, None if self.boxes is None else self.boxes.masks)
        held = sum(4 * view.numel() // 3 for view in views if view is not None)
        held += sum(mask.numel() // 3 for mask in masks if mask is not None)
        if self.image is None:
            return held
        return held + (self.image.pixels if isinstance(self.image, Patches) else self.image.width * self.image.height)


class Row(NamedTuple):
    """One box to classify, with its label in the box file; without a box, `box` is NaN and `why` gives the reason."""

    box: Tensor
    score: float | None
    why: str
    mask: Tensor | None
    label: str = ""


@dataclass(eq=False)
class Pending:
    """An image whose boxes are being classified."""

    item: Item
    rows: Sequence[Row]
    answers: list[ObjectPrediction | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.rows)

    @property
    def objects(self) -> tuple[ObjectPrediction, ...] | None:
        """The predictions of all boxes; None while any is missing."""
        found = tuple(answer for answer in self.answers if answer is not None)
        return found if len(found) == len(self.rows) else None

    def set_full(self, full: Tensor) -> None:
        """Store the logits `[classes]` of the full branch for the remaining boxes."""
        self.item = replace(self.item, full=full)


class Job(NamedTuple):
    """One box of an image, by its number, that is to be classified."""

    pending: Pending
    number: int

    @property
    def row(self) -> Row:
        """The box."""
        return self.pending.rows[self.number]


def images_of(jobs: Sequence[Job]) -> list[Pending]:
    """Return the images of the boxes, each once, in order."""
    return list({id(job.pending): job.pending for job in jobs}.values())


def pixels_of(item: Item | Prediction) -> int:
    """Return the size of an item in memory, in pixels; 0 for a prediction."""
    return item.pixels if isinstance(item, Item) else 0


def is_large(items: Iterable[Item]) -> bool:
    """Return whether the items should be processed before another image is decoded."""
    return sum(item.pixels for item in items) > BATCH_PIXELS


def whole_images(items: Sequence[Item]) -> list[Image.Image]:
    """Return the images of items that were decoded whole, for a localizer."""
    return [item.image for item in items if isinstance(item.image, Image.Image)]

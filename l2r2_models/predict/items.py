"""The images and boxes that the predictor passes between its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..boxes.detections import Detections
from .prediction import Prediction

BATCH_PIXELS = 50_000_000  # maximum number of pixels of decoded images held in memory


@dataclass(frozen=True)
class Item:
    """One image with its boxes, before it is classified."""

    name: str | None
    image: Image.Image
    boxes: Detections | None
    localizer_failure: str | None = None
    mask: Tensor | None = None
    full: Tensor | None = None  # logits of the full branch, if finding the box already computed them


class Row(NamedTuple):
    """One box to classify in image `item`; without a box, `box` is NaN and `why` gives the reason."""

    item: int
    box: Tensor
    score: float | None
    why: str
    mask: Tensor | None


def is_full(batch: Sequence[Item], size: int) -> bool:
    """Return whether the batch should be predicted before another image is decoded."""
    return len(batch) >= size or sum(item.image.width * item.image.height for item in batch) > BATCH_PIXELS


def merged(done: Sequence[Prediction | None], predicted: Sequence[Prediction]) -> Iterator[Prediction]:
    """Yield `done`, with each None replaced by the next of `predicted`."""
    waiting = iter(predicted)
    for prediction in done:
        yield prediction if prediction is not None else next(waiting)

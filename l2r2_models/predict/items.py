"""Images and boxes on their way through the predictor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..boxes.detections import Detections
from .prediction import Prediction

BATCH_PIXELS = 50_000_000  # decoded originals that are held at once


@dataclass(frozen=True)
class Item:
    """One image on its way through the predictor."""

    name: str | None
    image: Image.Image
    boxes: Detections | None
    localizer_failure: str | None = None
    mask: Tensor | None = None
    full: Tensor | None = None  # logits of the full branch, where the pass that found the box gave them


class Row(NamedTuple):
    """One box to classify, of image `item`; NaN where there is none, and why."""

    item: int
    box: Tensor
    score: float | None
    why: str
    mask: Tensor | None


def is_full(batch: Sequence[Item], size: int) -> bool:
    """Whether decoded originals are to be predicted before the next one is decoded."""
    return len(batch) >= size or sum(item.image.width * item.image.height for item in batch) > BATCH_PIXELS


def merged(done: Sequence[Prediction | None], predicted: Sequence[Prediction]) -> Iterator[Prediction]:
    """The predictions of a batch in order: the known ones, with the new ones in the gaps."""
    waiting = iter(predicted)
    for prediction in done:
        yield prediction if prediction is not None else next(waiting)

"""Report non-finite outputs as failures of their image, so that the other images are still predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .prediction import ObjectPrediction, Prediction


def checked(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Replace each prediction that has a NaN or infinite probability or box score by a failure that names it."""
    return [_checked(prediction) for prediction in predictions]


def _checked(prediction: Prediction) -> Prediction:
    wrong = dict.fromkeys(name for o in prediction.objects for name, score in _scores(o) if not math.isfinite(score))
    if not wrong:
        return prediction
    why = "the weights are damaged, the training has diverged, or the model needs float32"
    name = prediction.file or "image"
    return replace(prediction, objects=(), failure=f"{name}: the model's output is not finite ({', '.join(wrong)}); {why}.")


def _scores(answer: ObjectPrediction) -> list[tuple[str, float]]:
    branches = [(name, one.score) for name in ("full", "fg", "bg") if (one := getattr(answer, name)) is not None]
    boxes = [] if answer.box_score is None else [("box score", answer.box_score)]
    return [*branches, ("fused", answer.score), *boxes]

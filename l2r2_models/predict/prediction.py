"""Predictions, and the sentences that explain them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import L2R2Error

# prefixes of the reason in these cases
NO_BOX = "no box was given"
LOCALIZER_FAILED = "the localizer failed"
NO_FG = "the model has no fg branch"
Source = Literal["fused", "full", "rollup", "abstained"]
IMAGE_RULES = ("best", "weighted", "full")


def checked_rule(rule: str, branches: Sequence[str], cascade: bool) -> str:
    """Return the image rule.

    Raises:
        L2R2Error: when it is unknown, or needs a branch that the model lacks or the cascade may leave out.
    """
    if rule not in IMAGE_RULES:
        raise L2R2Error(f'Unknown image rule "{rule}"; choose from {", ".join(IMAGE_RULES)}.')
    if rule == "full" and "full" not in branches:
        raise L2R2Error('The image rule "full" needs a model with a full branch; use best or weighted.')
    if rule != "best" and cascade:
        raise L2R2Error(f'The image rule "{rule}" needs full, which a cascade may leave out; use one or the other.')
    return rule


@dataclass(frozen=True)
class Answer:
    """A class and its softmax probability."""

    label: str
    score: float


@dataclass(frozen=True)
class ObjectPrediction:
    """Prediction for one object.

    Attributes:
        label: the fused prediction; with `Rules.rollup`, a group of classes, or `unknown`, where no class is probable enough.
        score: its softmax probability, summed for a group; for `unknown`, that of the best class.
        source: `fused`, or `full` if no object was found and the whole image was classified; `rollup` for a group, and
            `abstained` for `unknown`.
        reason: one sentence that explains the prediction.
        full: prediction of the full branch; None if the model lacks the branch.
        fg: prediction of the fg branch; None if the model lacks the branch or no object was found.
        bg: prediction of the bg branch; None as for `fg`.
        box: xyxy in pixels of the upright image; None if there is no box.
        box_score: score of the box by the localizer; None if there is no score.
        top: the most probable classes of the fused prediction, best first.
        box_label: label of the box by the localizer, e.g. `animal`; None if there is none.
        logits: logits by branch, one per class; kept only if predictions are adapted by group, see `adapt`.
    """

    label: str
    score: float
    source: Source
    reason: str
    full: Answer | None
    fg: Answer | None
    bg: Answer | None
    box: tuple[float, float, float, float] | None
    box_score: float | None
    top: tuple[Answer, ...]
    box_label: str | None = None
    logits: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class ImageAnswer:
    """Prediction for an image as a whole, with its softmax probability and one sentence that explains it."""

    label: str
    score: float
    reason: str


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        file: path of the image; None if it was not read from a file.
        objects: one entry per object, best box first (with the fusion `objectness_max_confidence`, the highest product of box
            score and confidence first); exactly one entry if there is no box, and none after a failure.
        failure: why there is no prediction; None if there is one.
        size: `(height, width)` of the upright image in pixels; None after a failure.
        rule: how the prediction for the image follows from those for its objects, see `image_answer`.
    """

    file: str | None
    objects: tuple[ObjectPrediction, ...]
    failure: str | None = None
    size: tuple[int, int] | None = None
    rule: str = "best"

    @property
    def image(self) -> ImageAnswer:
        """Prediction for the image.

        Raises:
            L2R2Error: when the prediction failed, e.g. because the image could not be read.
        """
        if self.failure is not None:
            raise L2R2Error(self.failure)
        return image_answer(self.objects, self.rule)

    @property
    def label(self) -> str:
        """Label of the image, by default that of the first object; raises as `image` does."""
        return self.image.label

    @property
    def score(self) -> float:
        """Softmax probability of the label; raises as `image` does."""
        return self.image.score

    @property
    def reason(self) -> str:
        """Sentence that explains the label; raises as `image` does."""
        return self.image.reason

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without empty fields."""
        data = asdict(self)
        data["objects"] = [{k: v for k, v in o.items() if v is not None} for o in data["objects"]]
        if self.failure is not None:
            return {"file": self.file, "failure": self.failure}
        size = {} if self.size is None else {"width": self.size[1], "height": self.size[0]}
        return {"file": self.file, **size, "image": asdict(self.image), "objects": data["objects"]}


def product(answer: ObjectPrediction) -> float:
    """Return the fg confidence times the box score; 0 without an fg prediction."""
    return 0.0 if answer.fg is None else answer.fg.score * (1.0 if answer.box_score is None else answer.box_score)


def image_answer(objects: Sequence[ObjectPrediction], rule: str) -> ImageAnswer:
    """Derive the prediction for an image from those for its objects.

    Args:
        objects: at least one.
        rule: `best` for the first object's fused prediction; `full` for that of the full branch; `weighted` for the branch
            prediction with the highest confidence, weighted by the box score for fg and by 1 for full (RCOR;
            `docs/method.md`, section 4).
    """
    first = objects[0]
    if rule == "full" and first.full is not None:
        return ImageAnswer(first.full.label, first.full.score, "classified from the whole image")
    best = max(objects, key=product)
    if rule != "weighted" or (best.fg is None and first.full is None):
        return ImageAnswer(first.label, first.score, first.reason)
    if first.full is None or (best.fg is not None and product(best) >= first.full.score):
        assert best.fg is not None
        why = f"an object ({best.fg.score:.2f}, box {1.0 if best.box_score is None else best.box_score:.2f})"
        return ImageAnswer(best.fg.label, best.fg.score, f"{why} is the most confident of {len(objects)} and the whole image")
    return ImageAnswer(first.full.label, first.full.score, "the whole image is more confident than any object")


def why_fused(by_branch: dict[str, list[Answer]], over: Sequence[str] | None = None) -> str:
    """Explain a fused prediction in one phrase.

    Args:
        by_branch: predictions of each branch and of `fused`, best first.
        over: the branches that are fused; None for all.

    >>> why_fused({"fg": [Answer("cat", 0.9)], "full": [Answer("dog", 0.6)], "fused": [Answer("cat", 0.8)]})
    'the object (0.90) overrules the whole image, which predicts dog (0.60)'
    """
    by_branch = {b: answers for b, answers in by_branch.items() if over is None or b in (*over, "fg", "fused")}
    fg, fused = by_branch["fg"][0], by_branch["fused"][0]
    if "full" not in by_branch or by_branch["full"][0].label == fg.label:
        if fused.label == fg.label:
            return "the object and the whole image agree" if "full" in by_branch else "the object decides"
        return "the background decides" if "bg" in by_branch else "the fitted fusion overrules both"
    full = by_branch["full"][0]
    if fused.label == fg.label:
        return f"the object ({fg.score:.2f}) overrules the whole image, which predicts {full.label} ({full.score:.2f})"
    if fused.label == full.label:
        return f"the whole image ({full.score:.2f}) overrules the object, which predicts {fg.label} ({fg.score:.2f})"
    return f"a compromise between the object ({fg.label}) and the whole image ({full.label})"


def why_full(by_branch: dict[str, list[Answer]], why: str) -> str:
    """Explain the prediction for an image without an object in one phrase; `why` is the reason why there is none.

    >>> why_full({"fg": [], "full": []}, "no box was given")
    'no box was given; classified from the whole image'
    """
    if "fg" not in by_branch:
        return NO_FG
    if "full" not in by_branch:
        return f"{why}; the model has no full branch, so fg is applied to the whole image, which it was not trained on"
    return f"{why}; classified from the whole image"

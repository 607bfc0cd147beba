"""What a prediction is, and its reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import L2R2Error


@dataclass(frozen=True)
class Answer:
    """A class and its softmax probability."""

    label: str
    score: float


@dataclass(frozen=True)
class ObjectPrediction:
    """What one object is.

    Attributes:
        label, score: the fused answer and its softmax probability.
        source: `fused`, or `full` where no object was found and the whole image answers.
        reason: one sentence.
        full, fg, bg: what each branch says; None for a branch that the model lacks, or that had nothing to look at.
        box: xyxy pixels of the upright image, None without one; `box_score` is the localizer's.
        top: the most probable classes of the fused answer, best first.
        logits: of each branch, by class; kept only where predictions are adapted to their place, see `adapt`.
    """

    label: str
    score: float
    source: Literal["fused", "full"]
    reason: str
    full: Answer | None
    fg: Answer | None
    bg: Answer | None
    box: tuple[float, float, float, float] | None
    box_score: float | None
    top: tuple[Answer, ...]
    logits: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class Prediction:
    """What an image shows: one entry an object, best box first (with the fusion `objectness_max_confidence` the one with the
    highest product of score and confidence); exactly one where there is no box. `failure` says why there is none."""

    file: str | None
    objects: tuple[ObjectPrediction, ...]
    failure: str | None = None

    @property
    def label(self) -> str:
        """Label of the first object.

        Raises:
            L2R2Error: the image could not be read.
        """
        return self._first().label

    @property
    def score(self) -> float:
        """Softmax probability of the first object's label; errors as for `label`."""
        return self._first().score

    @property
    def reason(self) -> str:
        """Why the first object got its label; errors as for `label`."""
        return self._first().reason

    def _first(self) -> ObjectPrediction:
        if self.failure is not None:
            raise L2R2Error(self.failure)
        return self.objects[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without empty fields."""
        data = asdict(self)
        data["objects"] = [{k: v for k, v in o.items() if v is not None} for o in data["objects"]]
        if self.failure is not None:
            return {"file": self.file, "failure": self.failure}
        return {"file": self.file, "objects": data["objects"]}


def product(answer: ObjectPrediction) -> float:
    return 0.0 if answer.fg is None else answer.fg.score * (1.0 if answer.box_score is None else answer.box_score)


def why_fused(said: dict[str, list[Answer]], over: Sequence[str] | None = None) -> str:
    said = {b: answers for b, answers in said.items() if over is None or b in (*over, "fg", "fused")}
    fg, fused = said["fg"][0], said["fused"][0]
    if "full" not in said or said["full"][0].label == fg.label:
        if fused.label == fg.label:
            return "the object and the whole image agree" if "full" in said else "the object decides"
        return "the background decides" if "bg" in said else "the fitted fusion overrules both"
    full = said["full"][0]
    if fused.label == fg.label:
        return f"the object ({fg.score:.2f}) overrules the whole image, which says {full.label} ({full.score:.2f})"
    if fused.label == full.label:
        return f"the whole image ({full.score:.2f}) overrules the object, which says {fg.label} ({fg.score:.2f})"
    return f"a compromise between the object ({fg.label}) and the whole image ({full.label})"


def why_full(said: dict[str, list[Answer]], why: str) -> str:
    if "fg" not in said:
        return "the model has no fg branch"
    if "full" not in said:
        return f"{why}; the model has no full branch, so fg answers from the whole image, which it was not trained on"
    return f"{why}; the whole image answers"

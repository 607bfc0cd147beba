"""Predictions for groups of images, e.g. the sequence of photos that a camera takes of one animal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .rules import UNKNOWN


@dataclass
class Votes:
    """What the images of one group say.

    Attributes:
        scores: summed confidence by label.
        counts: number of images by label.
        images: number of images that count.
    """

    scores: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    images: int = 0

    def add(self, label: str, score: float) -> None:
        """Count the prediction for an image; a withheld one counts for no label."""
        self.images += 1
        if label != UNKNOWN:
            self.scores[label] += score
            self.counts[label] += 1


def with_groups(read: Callable[[], Iterable[dict[str, Any]]], groups: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the records of images with the prediction for their group, in the field `group`.

    The label of a group is the one with the highest sum of confidences over its images in which an object was found (all of its
    images, if there is none). Its score is the mean over these images of the confidence in this label, counting 0 for images with
    another label. If every prediction is withheld, the label is `unknown`.

    Args:
        read: returns a new iterator over the records on each call.
        groups: group by image, under the name that the image has in the records.

    >>> images = [{"file": f, "image": {"label": c, "score": p}, "objects": [{"fg": {}}]} for f, c, p in
    ...           [("1", "fox", 0.9), ("2", "dog", 0.6), ("3", "fox", 0.6)]]
    >>> next(with_groups(lambda: images, dict.fromkeys("123", "1")))["group"]
    {'name': '1', 'label': 'fox', 'score': 0.5, 'reason': 'fox in 2 of 3 images'}
    """
    found: dict[str, Votes] = {}
    whole: dict[str, Votes] = {}
    for record in read():
        if "image" in record:
            seen = any("fg" in o for o in record["objects"])
            votes = (found if seen else whole).setdefault(groups[record["file"]], Votes())
            votes.add(record["image"]["label"], record["image"]["score"])
    answers = {name: _answer(votes) for name, votes in {**whole, **found}.items()}
    for record in read():
        name = groups[record["file"]]
        yield {**record, "group": {"name": name, **answers.get(name, {})}}


def _answer(votes: Votes) -> dict[str, Any]:
    label = max(votes.scores, key=lambda name: (votes.scores[name], name), default=UNKNOWN)
    score = round(votes.scores.get(label, 0.0) / votes.images, 6)
    return {"label": label, "score": score, "reason": f"{label} in {votes.counts[label]} of {votes.images} images"}

"""Joint fusion of predictions for images taken at the same place, from stored branch logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import L2R2Error
from ..fusion import INPUTS, Fusion, GroupShare, fuse_branches, fused_logits, shares_of
from ..fusion.batch import UNFITTED
from .answers import with_fused
from .prediction import Answer, ObjectPrediction, Prediction
from .rules import Rules


class Adapter:
    """Fuse predictions again, given which images were taken at the same place (see `fuse_groups`).

    Args:
        fusion: a fusion with a batch rule.
        rules: class names, and the rules for naming them.
        top: number of classes listed per object.
        noun: word for a group in messages: `folder`, `batch`, or the name of a metadata column.
        image_rule: how the prediction for an image follows from those for its objects, see `image_answer`.

    Raises:
        L2R2Error: when the fusion has no batch rule.
    """

    def __init__(self, fusion: Fusion, rules: Rules, top: int, noun: str, image_rule: str = "best") -> None:
        if fusion.batch is None:
            raise L2R2Error(UNFITTED)
        self.fusion, self.rules, self.top, self.noun, self.image_rule = fusion, rules, top, noun, image_rule
        self.shares: dict[str, GroupShare] = {}
        self._groups: list[str] = []
        self._misled: list[float] = []

    def learn(self, objects: Iterable[tuple[ObjectPrediction, str]]) -> None:
        """Estimate the shares of misleading backgrounds from all objects and their groups; call it before `adapt`."""
        meter, clues, classes = self.fusion.batch.meter, [], []
        self._groups = []
        for answer, group in objects:
            if (given := logits_of(answer)) is not None and (found := fused_logits(self.fusion, given)) is not None:
                clues.append(float(meter.clues(*found[1:])))
                classes.append(int(found[1].argmax()))
                self._groups.append(group)
        known = torch.tensor(clues, dtype=torch.float64), torch.tensor(classes, dtype=torch.long)
        misled, self.shares = shares_of(meter, *known, self._groups)  # type: ignore[assignment]
        self._misled = misled.tolist()

    def adapt(self, objects: Iterable[ObjectPrediction]) -> Iterator[ObjectPrediction]:
        """Yield the objects with their prediction given the group.

        The prediction of an object without a box, or alone in its group, is the same as without groups.

        Args:
            objects: the objects that were passed to `learn`, in the same order.

        Raises:
            L2R2Error: when the branch logits of an object were not kept.
        """
        learned = zip(self._misled, self._groups)
        for answer in objects:
            if (given := logits_of(answer)) is None:
                yield answer
                continue
            misled, group = next(learned)
            yield self._again(answer, given, misled, self.shares[group])

    def _again(
        self, answer: ObjectPrediction, given: Mapping[str, torch.Tensor], misled: float, share: GroupShare
    ) -> ObjectPrediction:
        alone, found = math.isnan(misled), fused_logits(self.fusion, given)
        assert found is not None
        score = torch.tensor([1.0 if answer.box_score is None else answer.box_score])
        fused = (
            fuse_branches(self.fusion, given, None, score)
            if alone
            else self.fusion.batch.mixed(*found[1:], torch.tensor([[misled]]))
        )
        again = with_fused(answer, fused[0], self.rules, self.top, self.fusion.over)
        if alone:
            return again
        return replace(
            again, reason=f"{100 * share.misled:.0f} % of this {self.noun}'s backgrounds are misleading; {again.reason}"
        )


def logits_of(answer: ObjectPrediction) -> dict[str, torch.Tensor] | None:
    """Return the logits `[1, classes]` by branch; None if no object was found."""
    if answer.fg is None:
        return None
    if answer.logits is None:
        raise L2R2Error("These predictions have no branch logits; predict again with --store-logits.")
    return {b: torch.tensor([z]) for b, z in answer.logits.items()}


def object_of(record: Mapping[str, Any]) -> ObjectPrediction:
    """Rebuild an object from a record written by `Prediction.to_dict`."""
    fields = {name: record.get(name) for name in ("label", "score", "source", "reason", "box_score", "box_label", "logits")}
    fields |= {b: Answer(**record[b]) if b in record else None for b in INPUTS}
    box = tuple(record["box"]) if "box" in record else None
    return ObjectPrediction(**fields, box=box, top=tuple(Answer(**answer) for answer in record["top"]))  # type: ignore[arg-type]


def adapt_records(
    adapter: Adapter, read: Callable[[], Iterable[dict[str, Any]]], groups: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield the records of images with their objects adapted.

    Args:
        adapter: fuses the objects.
        read: returns a new iterator over the records on each call.
        groups: group by image, under the name that the image has in the records.
    """

    def objects() -> Iterator[dict[str, Any]]:
        return (o for record in read() for o in record.get("objects", ()))

    adapter.learn((object_of(o), groups[record["file"]]) for record in read() for o in record.get("objects", ()))
    adapted = adapter.adapt(map(object_of, objects()))
    for record in read():
        if "objects" in record:
            record = changed(record, [next(adapted) for _ in record["objects"]], adapter.image_rule)
        yield record


def changed(record: dict[str, Any], objects: Sequence[ObjectPrediction], image_rule: str) -> dict[str, Any]:
    """Return the record of an image with its objects, and the prediction for the image that follows from them, replaced."""
    plain = Prediction(record["file"], tuple(objects), rule=image_rule).to_dict()
    return {**record, "image": plain["image"], "objects": plain["objects"]}

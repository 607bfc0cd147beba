"""Counterfactuals: how the probability of a class changes when the object, its background, or its box is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..audit.classifier import Audited
from ..audit.perturbations import Subject, intervene, swap
from ..boxes.detections import Detections
from ..models.ifam import IFAM
from ..views import make_views
from .saliency import Question

WORDS = {
    "original": "unchanged",
    "bg_only_mask": "object's mask erased",
    "bg_only_box": "object's box erased",
    "tiled": "object filled from its surroundings",
    "fg_only": "background erased",
    "swapped": "background swapped",
    "box_grown": "box twice as large",
    "box_moved": "box moved off the object",
}
INTERVENTIONS = ("original", "bg_only_mask", "bg_only_box", "tiled", "fg_only")
MOST_PIXELS = 16_000_000  # pixels of changed images held in memory


@dataclass(frozen=True)
class Counterfactual:
    """One change and its effect.

    Attributes:
        name: see `WORDS`; `part_K` removes part K of an iFAM model.
        words: description of the change.
        probability: probability of the explained class, by output.
        label: label that the model predicts after the change.
        pixels: the changed image, uint8 `[H, W, 3]`; None if only the box or the model is changed.
    """

    name: str
    words: str
    probability: dict[str, float]
    label: str
    pixels: Tensor | None = None


@torch.inference_mode()
def probabilities(
    model: Audited, images: Sequence[Tensor], boxes: Tensor, masks: Sequence[Tensor | None], question: Question
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the probability `[B]` of the explained class by output, and the class index `[B]` that the model predicts.

    Args:
        model: the classifier.
        images: uint8 `[H, W, 3]`.
        boxes: `[B, 4]`, NaN for none.
        masks: `[H, W]` bool or None per image.
        question: gives the explained class.
    """
    device = next(model.network.parameters()).device
    views = make_views(images, boxes, model.spec, branches=model.branches, masks=masks, device=device)
    logits = {name: z.float().cpu() for name, z in model(views).items()}
    return {name: question.probability(z) for name, z in logits.items()}, list(logits.values())[-1].argmax(1)


def probability_of(
    model: Audited, answer: str, box: Tensor, mask: Tensor | None, question: Question
) -> Callable[[list[Tensor]], Tensor]:
    """Return a function from changed images to the probability `[B]` of one output; box and mask stay the same."""

    def of(images: list[Tensor]) -> Tensor:
        size = max(1, MOST_PIXELS // images[0].numel())
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        found = [probabilities(model, part, box.expand(len(part), 4), [mask] * len(part), question) for part in parts]
        return torch.cat([by_answer[answer] for by_answer, _ in found])

    return of


def counterfactuals(
    model: Audited, subject: Subject, question: Question, fill: Sequence[int], background: Tensor | None = None
) -> list[Counterfactual]:
    """Compute all counterfactuals that the image allows, the unchanged image first.

    Args:
        model: the classifier.
        subject: the image; its first box is the explained object.
        question: gives the explained class.
        fill: color of erased pixels.
        background: object-free background `[h, w, 3]` of another image, for `swapped`.
    """
    changed = {name: intervene(name, subject, fill, torch.empty(0)) for name in INTERVENTIONS}
    if background is not None:
        changed["swapped"] = swap(subject, background)
    made = {name: (pixels, subject.boxes[0], subject.view_mask) for name, pixels in changed.items() if pixels is not None}
    if "fg" in model.branches and not getattr(model.network, "finds_object", False):
        made |= {name: (subject.pixels, box, None) for name, box in other_boxes(subject).items()}
    found = []
    for name, (pixels, box, mask) in made.items():  # one at a time, because an image may be large
        by_answer, label = probabilities(model, [pixels], box[None], [mask], question)
        by_output = {answer: float(p) for answer, p in by_answer.items()}
        found.append(
            Counterfactual(name, WORDS[name], by_output, model.names[int(label)][0], pixels if name in changed else None)
        )
    return found + without_parts(model, subject, question)


def without_parts(model: Audited, subject: Subject, question: Question) -> list[Counterfactual]:
    """Compute the counterfactuals of an iFAM model without each of its parts; empty for other models."""
    network = model.network
    if not isinstance(network, IFAM) or network.parts.num_parts < 2:
        return []
    found = []
    for k in range(network.parts.num_parts):
        with network.intervened((k,)):
            by_answer, label = probabilities(model, [subject.pixels], subject.boxes[:1], [None], question)
        by_output = {answer: float(p) for answer, p in by_answer.items()}
        found.append(Counterfactual(f"part_{k}", f"without part {k}", by_output, model.names[int(label)][0]))
    return found


def other_boxes(subject: Subject) -> dict[str, Tensor]:
    """Return changed boxes `[4]` of the first object.

    `box_grown` has twice the side lengths and the same center. `box_moved` has the same size and is in the corner of the image
    that overlaps least with any object; it is left out if all corners overlap.
    """
    height, width = subject.pixels.shape[:2]
    x0, y0, x1, y1 = subject.boxes[0].tolist()
    w, h = x1 - x0, y1 - y0
    grown = [x0 - w / 2, y0 - h / 2, x1 + w / 2, y1 + h / 2]
    found = {"box_grown": Detections.from_lists([grown], (height, width)).clipped().boxes[0]}
    corners = [(x, y) for y in (0.0, height - h) for x in (0.0, width - w) if x >= 0 and y >= 0]
    shared = []
    for x, y in corners:
        ((left, top, right, bottom),) = Detections.from_lists([[x, y, x + w, y + h]], (height, width)).windows()[0].tolist()
        shared.append(float(subject.in_boxes[top:bottom, left:right].float().mean()))
    if shared and min(shared) < 0.05:
        x, y = corners[shared.index(min(shared))]
        found["box_moved"] = torch.tensor([x, y, x + w, y + h])
    return found

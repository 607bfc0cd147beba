"""Run a model on the changed images of an audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import L2R2Error
from ..hardware import rows_per_pass
from ..pipe import in_order
from ..views import Views, make_views
from .classifier import Audited
from .perturbations import Donors, Subject, plan
from .samples import Subjects

BATCH_PIXELS = 50_000_000  # pixels of changed images held in memory


@dataclass(frozen=True)
class Task:
    """What the predictions of an audit depend on.

    Attributes:
        model: the model.
        subjects: the images.
        matched: class indices of the model by label, see `match_classes`.
        donors: draws the backgrounds.
        challenge: see `run_audit`.
        batch_size: changed images per forward pass; does not affect the result.
    """

    model: Audited
    subjects: Subjects
    matched: Mapping[str, Sequence[int]]
    donors: Donors
    challenge: bool
    batch_size: int


Compute = Callable[[Task, Sequence[int], int], Iterator[tuple[int, Tensor]]]


def answers_of(task: Task, todo: Sequence[int], workers: int) -> Iterator[tuple[int, Tensor]]:
    """Run the model on the changed images of some subjects.

    Args:
        task: the audit.
        todo: indices of the subjects.
        workers: number of threads that decode and change images in advance; 0 for none.

    Yields:
        Index of a subject, and its `[outputs, interventions, 3]`, see `audit.Answers`.

    Raises:
        L2R2Error: when an image has changed since it was checked, or the logits are not finite.
    """
    model, subjects, donors = task.model, task.subjects, task.donors
    shape = len(model.answers), len(plan(donors.backgrounds, task.challenge)), 3
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.network.to(device)

    def change(i: int) -> _Changed:
        subject = subjects[i]
        size = min(
            rows_per_pass(device, task.batch_size, len(set(model.answers) - {"fused"})),
            max(1, BATCH_PIXELS // (max(1, workers) * subject.inside.numel())),
        )
        changed = iter(subjects.changed(i, subject, donors, model.grain, donors.seed))
        parts = []
        while part := list(islice(changed, size)):
            places, images = zip(*part)
            parts.append((list(places), _views(model, images, subject, device)))
        return _Changed(subject, size, parts)

    try:
        prepared = in_order(change, todo, workers, weigh=_Changed.pixels)
        for i, (subject, size, parts) in zip(todo, prepared):
            row = torch.full(shape, torch.nan)
            own = list(task.matched[subjects.labels[i]])
            for places, views in parts:
                logits = _logits(model, views)
                for a, name in enumerate(model.answers):
                    row[a, places] = _scores(logits[name], own)
            if task.challenge:
                row[:, -1, :2] = _challenged(model, subjects.challenges(i, subject, donors), subject, own, size, device)
            if not row[:, 0].isfinite().all():
                raise L2R2Error(f"{model.name}: the logits are not finite; its training has diverged.")
            yield i, row
    finally:
        model.network.cpu()


def _challenged(
    model: Audited, changed: Iterable[Tensor], subject: Subject, own: list[int], size: int, device: torch.device
) -> Tensor:
    """Return `[outputs, 2]`: whether all images are correct, and the lowest true-class probability; stops when all are wrong."""
    worst, images = torch.ones(len(model.answers), 2), iter(changed)
    while (part := list(islice(images, size))) and worst[:, 0].any():
        logits = _logits(model, _views(model, part, subject, device))
        worst = torch.minimum(worst, torch.stack([_scores(logits[name], own)[:, :2].amin(0) for name in model.answers]))
    return worst


class _Changed(NamedTuple):
    """A subject, the number of its changed images per batch, and the places in `plan` and views of each batch."""

    subject: Subject
    size: int
    parts: list[tuple[list[int], Views]]

    def pixels(self) -> int:
        """Return the number of uint8 RGB pixels that would take as much memory as the views."""
        return sum(4 * view.numel() // 3 for _, views in self.parts for view in views.inputs().values())


def _views(model: Audited, images: Sequence[Tensor], subject: Subject, device: torch.device) -> Views:
    boxes, masks = subject.boxes[:1].expand(len(images), 4), [subject.view_mask] * len(images)
    return make_views(images, boxes, model.spec, branches=model.branches, masks=masks, device=device)


@torch.inference_mode()
def _logits(model: Audited, views: Views) -> dict[str, Tensor]:
    return {name: z.float().cpu() for name, z in model(views).items()}


def _scores(logits: Tensor, own: list[int]) -> Tensor:
    """Return `[B, 3]`: whether the most probable class is among `own`, the sum of their probabilities, and that class."""
    best = logits.argmax(-1)
    right = torch.isin(best, torch.tensor(own))
    values = torch.stack([right.float(), logits.double().softmax(-1)[:, own].sum(-1).float(), best.float()], 1)
    return values.where(logits.isfinite().all(1, keepdim=True), torch.nan)

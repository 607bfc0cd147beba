"""Measure how much a classifier relies on the background, by changing images; `l2r2 audit` prints the result."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.table import ImageTable, read_table, rows_digest
from ..errors import L2R2Error
from ..evaluate.fit_run import rows_of, warnings_of
from ..hardware import rows_per_pass
from ..io import check_readable, write_atomic
from ..pipe import in_order, worker_count
from ..versions import version_of
from ..views import Views, make_views
from .classifier import Audited, load_audited, match_classes
from .metrics import Estimate, measures
from .perturbations import Donors, Subject, number_of, plan
from .samples import Progress, Subjects, find_subjects
from .verdict import advice_of, verdict_of

logger = logging.getLogger(__name__)
BATCH_PIXELS = 50_000_000  # pixels of changed images held in memory
SAVES = 50  # how many times an audit stores its intermediate results


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        model, split: what was audited, and on which split.
        images, classes: number of images that have an object and a background, and of their classes.
        left_out: number of other images, by reason.
        answers: metrics (see `audit.metrics.measures`) by output: `full`, `fg` and `fused`, the model's own prediction last.
        verdicts: one sentence per output.
        groups: the metadata column of the groups, or None.
        settings: seed, number of random backgrounds, whether every background was tried, limit.
        warnings: limitations of the result, in sentences.
    """

    model: str
    split: str
    images: int
    classes: int
    left_out: dict[str, int]
    answers: dict[str, dict[str, Estimate]]
    verdicts: dict[str, str]
    groups: str | None
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The verdict on the model's own prediction."""
        return list(self.verdicts.values())[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Answers:
    """The model's predictions for every changed image.

    Attributes:
        values: `[N, outputs, interventions, 3]` float32: correct (1 or 0), probability of the true class, and index of the most
            probable class of the model; NaN if the intervention cannot be applied to the image.
        names: names of the outputs.
        interventions: names of the interventions, see `perturbations.plan`.
    """

    values: Tensor
    names: tuple[str, ...]
    interventions: tuple[str, ...]

    def of(self, answer: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Select the values of one output.

        Args:
            answer: name of the output.

        Returns:
            `[N]` correct, and `[N]` probability of the true class, by intervention; interventions that apply to no image
            are left out.
        """
        own = self.values[:, self.names.index(answer)]
        made = [i for i in range(len(self.interventions)) if own[:, i, 0].isfinite().any()]
        return tuple({self.interventions[i]: own[:, i, part] for i in made} for part in (0, 1))  # type: ignore[return-value]


class AuditRun(NamedTuple):
    """An audit with the images, predictions and view size it was computed from, and the model's classes, for `report.audit`."""

    result: Audit
    subjects: Subjects
    answers: Answers
    size: int
    classes: tuple[str, ...]


def audit(model: str | Path, data: str | Path, **options: Any) -> Audit:
    """Measure how much a classifier relies on the background; arguments and errors as for `run_audit`.

    >>> print(audit("timm:resnet18", "data/", split="test").verdict)  # doctest: +SKIP
    """
    return run_audit(model, data, **options).result


def run_audit(
    model: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    group: str | None = None,
    boxes: str | Path | None = None,
    metadata: str | Path | None = None,
    labels: Path | None = None,
    classes: Path | None = None,
    limit: int | None = None,
    backgrounds: int = 5,
    challenge: bool = False,
    seed: int = 0,
    skip_bad: bool = False,
    work: Path | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    progress: Progress = lambda items, *_: items,
) -> AuditRun:
    """Measure how much a classifier relies on the background (`docs/method.md`, section 9).

    Images are changed at their original size (at most 2 megapixels) before any view is cut; the box stays the same. A prediction
    is correct if the most probable class of the model is one of those matched to the label. The same call continues an
    interrupted audit.

    Args:
        model, labels: see `load_audited`.
        data, boxes, metadata: see `read_table`.
        split: defaults to `test`, or to all images if there are no splits; `val` also finds the rows that a run held out.
        group: a metadata column; adds the accuracy per value and the worst of them.
        classes: see `match_classes`.
        limit: largest number of images, drawn with the seed.
        backgrounds: random backgrounds per image, for `mixed_rand` and `challenge_upper_bound`.
        challenge: also try the background of every other image until each output is wrong, for `challenge` as IN-9 defines it.
            The cost grows with the square of the number of images.
        seed: random seed of limit, noise, backgrounds and intervals; the order of the rows does not matter.
        skip_bad: skip unreadable images instead of stopping.
        work: folder for intermediate results; defaults to `audit` in the run folder, or else in the user's cache folder.
        batch_size: changed images per forward pass; does not affect the result.
        workers: number of threads that decode and change images in advance; 0 for none, by default one per core.
        progress: wraps the iteration over the images.

    Returns:
        The audit, with the images and predictions it was computed from.

    Raises:
        L2R2Error: when model or data are unusable, classes do not match, or no image has an object and a background.
    """
    audited = load_audited(model, labels)
    table = _rows(audited, read_table(data, metadata=metadata, boxes=boxes), split)
    matched = match_classes(sorted({str(row.label) for row in table.rows if row.label}), audited, classes)
    if group is not None:
        table.column(group)
    subjects = find_subjects(
        table, audited.spec.fill, audited.box_threshold, limit=limit, seed=seed, skip_bad=skip_bad, progress=progress
    )
    store = Store(work or _work_folder(audited), audited, subjects, matched, plan(backgrounds, challenge), seed)
    donors = Donors(subjects.keys, subjects.labels, backgrounds, seed, subjects.images.tolist())
    answers = _run_model(audited, subjects, matched, donors, challenge, store, batch_size, worker_count(workers), progress)
    groups = subjects.table.column(group) if group else None
    found = {name: measures(*answers.of(name), subjects.images, groups, subjects.labels, seed=seed) for name in audited.answers}
    split_name = split or ("test" if table.splits else "all")
    count = len(set(subjects.labels))
    result = Audit(
        audited.name,
        split_name,
        len(subjects),
        count,
        subjects.left_out,
        found,
        {name: verdict_of(_who(audited, name), found[name], len(subjects), count) for name in audited.answers},
        group,
        {"seed": seed, "backgrounds": backgrounds, "challenge": challenge, "limit": limit},
        _warnings(audited, subjects, split_name, found),
    )
    readable = tuple(names[min(1, len(names) - 1)] for names in audited.names)  # not the WordNet ids of ImageNet
    return AuditRun(result, subjects, answers, audited.grain, readable)


def _rows(audited: Audited, table: ImageTable, split: str | None) -> ImageTable:
    if split is None:
        return table.of_split("test") if table.splits else table
    return rows_of(audited.folder, table, split) if audited.folder else table.of_split(split)


def _who(audited: Audited, answer: str) -> str:
    return "this model" if answer == audited.answers[-1] else f"the {answer} branch alone"


def _warnings(
    audited: Audited, subjects: Subjects, split: str, estimates: Mapping[str, Mapping[str, Estimate]]
) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if audited.folder is not None:
        found = warnings_of(audited.folder, subjects.table, split, "do not carry over to new images")
    for reason, count in sorted(subjects.left_out.items()):
        found += (f"{count} of {len(subjects) + sum(subjects.left_out.values())} images left out: {reason}.",)
    if len(set(subjects.labels)) == 1:
        found += ("all images have the same class, so there are no backgrounds of other classes.",)
    masks = any(row.mask_file is not None for row in subjects.table.rows)
    if advice := advice_of(estimates.get("fg", {}), audited.spec.fg_mode, masks):
        found += (advice,)
    if not masks:
        found += ("there are boxes but no masks, so the background inside a box counts as object and moves with it.",)
    return found


def _work_folder(audited: Audited) -> Path:
    if audited.folder is not None:
        return audited.folder / "audit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2r2" / "audit"


def _run_model(
    model: Audited,
    subjects: Subjects,
    matched: Mapping[str, Sequence[int]],
    donors: Donors,
    challenge: bool,
    store: Store,
    batch_size: int,
    workers: int,
    progress: Progress,
) -> Answers:
    """Run the model on all changed images that are not in the store yet."""
    names, made = model.answers, tuple(plan(donors.backgrounds, challenge))
    values = store.read((len(subjects), len(names), len(made), 3))
    todo = [i for i in range(len(subjects)) if not values[i].isfinite().any()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.network.to(device)

    def change(i: int) -> _Changed:
        subject = subjects[i]
        size = min(
            rows_per_pass(device, batch_size, len(set(names) - {"fused"})),
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
        for count, (i, (subject, size, parts)) in enumerate(zip(progress(todo, len(todo), "changing images"), prepared), 1):
            row = torch.full(values.shape[1:], torch.nan)
            own = list(matched[subjects.labels[i]])
            for places, views in parts:
                logits = _logits(model, views)
                for a, name in enumerate(names):
                    row[a, places] = _scores(logits[name], own)
            if challenge:
                row[:, -1, :2] = _challenged(model, subjects.challenges(i, subject, donors), subject, own, size, device)
            if not row[:, 0].isfinite().all():
                raise L2R2Error(f"{model.name}: the logits are not finite; its training has diverged.")
            values[i] = row
            if count % max(1, len(todo) // SAVES) == 0:
                store.write(values)
    finally:
        model.network.cpu()
        store.write(values)
    return Answers(values, names, made)


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


class Store:
    """Intermediate results of an audit, one file per model, images, classes and settings."""

    def __init__(
        self,
        folder: Path,
        model: Audited,
        subjects: Subjects,
        matched: Mapping[str, Sequence[int]],
        made: Sequence[str],
        seed: int,
    ) -> None:
        data = rows_digest(subjects.table, times=True)
        parts = [version_of("l2r2-models"), model.digest(), matched, data, list(made), seed]
        if subjects.shared:  # their backgrounds depend on rows that may be outside the audit
            parts.append(rows_digest(ImageTable(subjects.table.root, tuple(subjects.shared.values()))))
        self.key = json.dumps(parts, sort_keys=True)
        self.file = folder / f"{number_of(0, self.key):016x}.safetensors"
        self.writable = True

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """Read the stored values; NaN where there are none. All are NaN if the file is damaged or from another audit."""
        try:
            check_readable(self.file, most=None)
            with safe_open(self.file, "pt") as stored:
                if (stored.metadata() or {}).get("key") == self.key:
                    values: Tensor = stored.get_tensor("values")
                    if values.shape == shape:
                        return values.clone()
        except (SafetensorError, OSError, L2R2Error):
            pass
        return torch.full(shape, torch.nan)

    def write(self, values: Tensor) -> None:
        """Store the values atomically; if that fails, warn once and go on."""
        if not self.writable:
            return
        try:
            write_atomic(self.file, lambda path: save_file({"values": values}, path, {"key": self.key}))
        except L2R2Error as error:
            self.writable = False
            logger.warning("%s", error)

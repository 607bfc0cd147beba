"""`l2r2 audit` without its printing: how much a classifier leans on the background, measured by changing images."""

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
from ..io import check_readable, write_atomic
from ..versions import version_of
from ..views import make_views
from .classifier import Audited, load_audited, match_classes
from .metrics import Estimate, measures
from .perturbations import Donors, Subject, number_of, plan
from .samples import Progress, Subjects, find_subjects
from .verdict import verdict_of

logger = logging.getLogger(__name__)
BATCH_PIXELS = 50_000_000  # changed originals that are held at once
SAVES = 50  # how often an audit stores what it has


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        model, split, images, classes: what was judged: images that have an object and a background, and their classes.
        left_out: the other images, counted by reason.
        answers: figures (see `robustness.measures`) of `full`, `fg` and `fused`; the model's own answer last.
        verdicts: one sentence on each of them.
        groups: the metadata column of the groups, or None.
        settings: seed, number of random backgrounds, limit.
        warnings: sentences.
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
        """The sentence on the model's own answer."""
        return list(self.verdicts.values())[-1]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Answers:
    """What the model said of every changed image.

    Attributes:
        values: `[N, answers, interventions, 2]` float32: right (1 or 0), probability of the true class; NaN where not made.
        names, interventions: of the second and third axis.
    """

    values: Tensor
    names: tuple[str, ...]
    interventions: tuple[str, ...]

    def of(self, answer: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`[N]` right and `[N]` probability by intervention, those that some image has."""
        own = self.values[:, self.names.index(answer)]
        made = [i for i in range(len(self.interventions)) if own[:, i, 0].isfinite().any()]
        return tuple({self.interventions[i]: own[:, i, part] for i in made} for part in (0, 1))  # type: ignore[return-value]


class AuditRun(NamedTuple):
    """An audit with what it was computed from, for its report: the images, the answers, and the side of the model's view."""

    result: Audit
    subjects: Subjects
    answers: Answers
    size: int


def audit(model: str | Path, data: str | Path, **options: Any) -> Audit:
    """Judge how much a classifier leans on the background; arguments and errors as `run_audit` has them."""
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
    progress: Progress = lambda items, *_: items,
) -> AuditRun:
    """Judge how much a classifier leans on the background (METHOD.md 9).

    Images are changed at their own size (at 2 megapixels where they have more), before any view is cut; the box stays where it
    was. A class is answered right if the most probable of all classes of the model is one that means it. Interrupted, the same
    call continues.

    Args:
        model, labels: see `load_audited`.
        data, boxes, metadata: see `read_table`.
        split: by default `test`, or all images where there are no splits; `val` also means what a run held out.
        group: a metadata column; adds the accuracy by its values and the worst of them.
        classes: see `match_classes`.
        limit: at most so many images, drawn with the seed.
        backgrounds: random backgrounds per image, for `mixed_rand` and `challenge_upper_bound`.
        challenge: also try the background of every other image until each answer is fooled, for `challenge` as IN-9 defines it.
            The cost grows with the square of the number of images that are not fooled.
        seed: of images, noise, backgrounds and intervals. Same seed, same figures, whatever the order of the rows.
        skip_bad: leave unreadable images out instead of stopping.
        work: folder for what is done so far; by default `audit` in a run's folder, else the user's cache folder.
        batch_size: changed images in one pass; changes no figure.
        progress: wraps the images.

    Raises:
        L2R2Error: unusable model or data, classes that do not match, or no image with an object and a background.
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
    answers = _ask(audited, subjects, matched, donors, challenge, store, batch_size, progress)
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
        _warnings(audited, subjects, split_name),
    )
    return AuditRun(result, subjects, answers, audited.spec.size)


def _rows(audited: Audited, table: ImageTable, split: str | None) -> ImageTable:
    if split is None:
        return table.of_split("test") if table.splits else table
    return rows_of(audited.folder, table, split) if audited.folder else table.of_split(split)


def _who(audited: Audited, answer: str) -> str:
    return "this model" if answer == audited.answers[-1] else f"the {answer} branch alone"


def _warnings(audited: Audited, subjects: Subjects, split: str) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if audited.folder is not None:
        found = warnings_of(audited.folder, subjects.table, split, "say little about new images")
    for reason, count in sorted(subjects.left_out.items()):
        found += (f"{count} of {len(subjects) + sum(subjects.left_out.values())} images left out: {reason}.",)
    if len(set(subjects.labels)) == 1:
        found += ("the images show one class only, so no background of another class can be given to them.",)
    if all(row.mask_file is None for row in subjects.table.rows):
        found += (
            "objects are known by boxes, not masks: what a box holds beside the object counts as object and moves with it.",
        )
    return found


def _work_folder(audited: Audited) -> Path:
    if audited.folder is not None:
        return audited.folder / "audit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2r2" / "audit"


def _ask(
    model: Audited,
    subjects: Subjects,
    matched: Mapping[str, Sequence[int]],
    donors: Donors,
    challenge: bool,
    store: Store,
    batch_size: int,
    progress: Progress,
) -> Answers:
    """Show the model every changed image of every subject, but for those that the store has."""
    names, made = model.answers, tuple(plan(donors.backgrounds, challenge))
    values = store.read((len(subjects), len(names), len(made), 2))
    todo = [i for i in range(len(subjects)) if not values[i].isfinite().any()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.network.to(device)
    try:
        for count, i in enumerate(progress(todo, len(todo), "changing images"), 1):
            row = torch.full(values.shape[1:], torch.nan)
            own = list(matched[subjects.labels[i]])
            subject = subjects[i]
            size = min(batch_size, max(1, BATCH_PIXELS // subject.inside.numel()))
            changed = iter(subjects.changed(i, subject, donors, model.spec.size, donors.seed))
            while part := list(islice(changed, size)):
                places, images = zip(*part)
                logits = _logits(model, images, subject.boxes[0], subject.view_mask, device)
                for a, name in enumerate(names):
                    row[a, list(places)] = _judged(logits[name], own)
            if challenge:
                row[:, -1] = _challenged(model, subjects.challenges(i, subject, donors), subject, own, size, device)
            if not row[:, 0].isfinite().all():
                raise L2R2Error(f"{model.name}: gives logits that are not finite; its training has diverged.")
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
    """`[answers, 2]`: whether every image was right, and the lowest probability of the true class; stops once all are fooled."""
    worst, images = torch.ones(len(model.answers), 2), iter(changed)
    while (part := list(islice(images, size))) and worst[:, 0].any():
        logits = _logits(model, part, subject.boxes[0], subject.view_mask, device)
        worst = torch.minimum(worst, torch.stack([_judged(logits[name], own).amin(0) for name in model.answers]))
    return worst


@torch.inference_mode()
def _logits(
    model: Audited, images: Iterable[Tensor], box: Tensor, mask: Tensor | None, device: torch.device
) -> dict[str, Tensor]:
    images = list(images)
    views = make_views(
        images, box.expand(len(images), 4), model.spec, branches=model.branches, masks=[mask] * len(images), device=device
    )
    return {name: z.float().cpu() for name, z in model(views).items()}


def _judged(logits: Tensor, own: list[int]) -> Tensor:
    """Logits `[B, classes]` -> `[B, 2]`: whether the most probable class is among `own`, and the sum of their probabilities."""
    right = torch.isin(logits.argmax(-1), torch.tensor(own))
    values = torch.stack([right.float(), logits.double().softmax(-1)[:, own].sum(-1).float()], 1)
    return values.where(logits.isfinite().all(1, keepdim=True), torch.nan)


class Store:
    """What an audit has so far, one file for a model, its classes, the images, the seed and the number of backgrounds."""

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
        facts = [version_of("l2r2-models"), model.digest(), matched, data, list(made), seed]
        if subjects.shared:  # their backgrounds hang on rows that may not be among the subjects
            facts.append(rows_digest(ImageTable(subjects.table.root, tuple(subjects.shared.values()))))
        self.key = json.dumps(facts, sort_keys=True)
        self.file = folder / f"{number_of(0, self.key):016x}.safetensors"
        self.writable = True

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """Values of `shape`, NaN where nothing is stored, or where there is any doubt."""
        try:
            check_readable(self.file, most=None)
            with safe_open(self.file, "pt") as stored:
                if (stored.metadata() or {}).get("key") == self.key and (values := stored.get_tensor("values")).shape == shape:
                    return values.clone()
        except (SafetensorError, OSError, L2R2Error):
            pass
        return torch.full(shape, torch.nan)

    def write(self, values: Tensor) -> None:
        """Atomically; where it cannot be written, once a warning, because the audit can go on."""
        if not self.writable:
            return
        try:
            write_atomic(self.file, lambda path: save_file({"values": values}, path, {"key": self.key}))
        except L2R2Error as error:
            self.writable = False
            logger.warning("%s", error)

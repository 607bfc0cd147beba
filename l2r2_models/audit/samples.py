"""The images of an audit: those with an object and a background, and the reasons why others are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.composite import cover
from ..data.dataset import sample_of
from ..data.table import ImageTable, Row
from ..errors import L2R2Error
from ..images import ImageError
from .perturbations import Donors, Subject, intervene, noise_pattern, number_of, plan, swap

KEPT_BYTES = 500_000_000
MOST_PIXELS = 2_000_000  # larger images are downscaled, because each is changed some 34 times and views are much smaller
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Subjects:
    """The audited images, sorted by name, so that the order of the data does not matter.

    Attributes:
        table: their rows.
        keys: their unique names.
        left_out: number of other images by reason.
        fill: color of transparent and of erased pixels.
        threshold: boxes with a lower score count as not found.
        shared: images that several rows show, with the objects of all these rows.
        backgrounds: cache of object-free backgrounds by row; most are used several times.
    """

    table: ImageTable
    keys: tuple[str, ...]
    left_out: dict[str, int]
    fill: tuple[int, ...]
    threshold: float
    shared: dict[Path, Row] = field(default_factory=dict)
    backgrounds: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def labels(self) -> list[str]:
        """`[N]` class names."""
        return [str(row.label) for row in self.table.rows]

    @property
    def images(self) -> Tensor:
        """`[N]` int64 index of each row's image file."""
        number: dict[Path, int] = {}
        return torch.tensor([number.setdefault(row.path, len(number)) for row in self.table.rows])

    def __getitem__(self, i: int) -> Subject:
        """Decode one image.

        Raises:
            L2R2Error: when it has changed since it was checked.
        """
        found = subject_of(self.keys[i], self.table.rows[i], self.fill, self.threshold)
        if isinstance(found, str):
            raise L2R2Error(f"{self.table.rows[i].path}: the image changed during the audit ({found}); run the audit again.")
        return found

    def changed(self, i: int, subject: Subject, donors: Donors, grain: int, seed: int) -> Iterable[tuple[int, Tensor]]:
        """Yield the changed images of subject i with their index in `plan`; interventions that do not apply are skipped.

        Args:
            i: row index.
            subject: the decoded image.
            donors: draws the backgrounds.
            grain: side of the model's view, which sets the grain of the noise.
            seed: random seed of the noise.
        """
        of = donors.of(i)
        noise = noise_pattern(subject, grain, seed)
        for place, name in enumerate(plan(donors.backgrounds)):
            if name.startswith("mixed_"):
                pixels = swap(subject, self._background(of[name])) if name in of else None
            else:
                pixels = intervene(name, subject, self.fill, noise)
            if pixels is not None:
                yield place, pixels

    def challenges(self, i: int, subject: Subject, donors: Donors) -> Iterable[Tensor]:
        """Yield subject i on the background of every other image."""
        return (swap(subject, self._background(other)) for other in donors.others(i))

    def _background(self, i: int) -> Tensor:
        if (found := self.backgrounds.get(i)) is None:  # another thread may clear the cache
            if sum(kept.numel() for kept in list(self.backgrounds.values())) > KEPT_BYTES:
                self.backgrounds.clear()
            found = self.backgrounds[i] = self._donor(i).background
        return found

    def _donor(self, i: int) -> Subject:
        """Return subject i with all objects in its image, including those of other rows."""
        row = self.shared.get(self.table.rows[i].path)
        found = None if row is None else subject_of(self.keys[i], row, self.fill, self.threshold)
        return found if isinstance(found, Subject) else self[i]


def subject_of(key: str, row: Row, fill: Sequence[int], threshold: float) -> Subject | str:
    """Decode a row, downscaled to `MOST_PIXELS`.

    Returns:
        The image; or the reason why it cannot be audited, if it has no object or no background.

    Raises:
        ImageError: when the image cannot be read.
        L2R2Error: when its box or mask is invalid.
    """
    sample = sample_of(row, fill, threshold)
    if sample.mask is not None and not sample.mask.any():
        return "empty mask"
    if not sample.box.isfinite().all():
        return "no box or mask"
    size = (sample.pixels.shape[0], sample.pixels.shape[1])
    boxes, mask = sample.box[None], sample.mask
    if row.entry is not None:
        found = row.entry.detections(size, str(row.path)).above(threshold).usable()
        boxes = found.boxes
        if row.mask_file is None and found.masks is not None:
            mask = found.masks.any(0)
    subject = shrunk(Subject(key, sample.pixels, boxes, mask, sample.mask))
    if subject.mask is not None and not subject.mask.any():
        return "empty mask"
    return "object fills the image" if subject.inside.all() else subject


def shrunk(subject: Subject) -> Subject:
    """Downscale to `MOST_PIXELS` if it has more."""
    height, width = subject.pixels.shape[:2]
    scale = (MOST_PIXELS / (height * width)) ** 0.5
    if scale >= 1:
        return subject
    size = max(1, round(scale * height)), max(1, round(scale * width))

    def resized(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else F.interpolate(mask[None, None].float(), size, mode="area")[0, 0] >= 0.5

    boxes = subject.boxes * torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    return Subject(subject.key, cover(subject.pixels, size), boxes, resized(subject.mask), resized(subject.view_mask))


def find_subjects(
    table: ImageTable, fill: Sequence[int], threshold: float, *, limit: int | None, seed: int, skip_bad: bool, progress: Progress
) -> Subjects:
    """Decode every image once and keep those that can be audited.

    Args:
        table: rows with labels.
        fill, threshold: see `sample_of`.
        limit: largest number of images, drawn with the seed; None for all.
        seed: random seed.
        skip_bad: skip unreadable images instead of stopping.
        progress: wraps the iteration over the rows.

    Raises:
        L2R2Error: when an image has no label or cannot be read (without `skip_bad`), or none can be audited.
    """
    if missing := [row for row in table.rows if not row.label]:
        first = missing[0].path.name
        raise L2R2Error(f"{table.root}: {len(missing)} of {len(table)} images have no label, e.g. {first}; label or remove them.")
    rows = _named(table)
    if limit is not None:
        rows = sorted(sorted(rows, key=lambda named: number_of(seed, named[0], "limit"))[:limit])
    reasons: list[str | None] = []

    def check(named: tuple[str, Row]) -> str | None:
        try:
            found = subject_of(*named, fill, threshold)
        except ImageError:
            if skip_bad:
                return "unreadable"
            raise
        return found if isinstance(found, str) else None

    with ThreadPoolExecutor(2) as pool:
        reasons += progress(pool.map(check, rows), len(rows), "finding objects")
    kept = [named for named, reason in zip(rows, reasons) if reason is None]
    left_out = dict(Counter(reason for reason in reasons if reason is not None))
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise L2R2Error(
            f"{table.root}: none of the {len(rows)} images can be audited ({why}); pass boxes with --boxes FILE or as "
            "the columns x0,y0,x1,y1 of the metadata, or masks as its column mask_file."
        )
    times = Counter(row.path for row in table.rows)
    shared = {row.path: row for row in table.whole_images() if times[row.path] > 1}
    subjects = ImageTable(table.root, tuple(row for _, row in kept))
    return Subjects(subjects, tuple(key for key, _ in kept), left_out, tuple(fill), threshold, shared)


def _named(table: ImageTable) -> list[tuple[str, Row]]:
    """Return the rows sorted by unique name; rows of one image are numbered in the order of their boxes."""
    names = [(name, repr(row.entry), row) for name, row in zip(table.names(), table.rows)]
    names.sort(key=lambda item: item[:2])
    seen: Counter[str] = Counter()
    keys = []
    for name, _, row in names:
        keys.append((f"{name}#{seen[name]}" if seen[name] else name, row))
        seen[name] += 1
    return keys

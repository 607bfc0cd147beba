"""Rows to fit a fusion on: held-out images unchanged, on other backgrounds, or both.

Held-out images usually have the training backgrounds, so a fusion fitted on them favors full and loses accuracy where
backgrounds change (L2R2 reports this on Spawrious). Pasting the objects onto the backgrounds of other images shows how
confident full is when the background is uninformative. This needs no images of a shifted split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..data.layout import metadata_in
from ..data.shards import packed_in
from ..data.swap import donors_of, swapped
from ..data.table import ImageTable, Row, read_table
from ..errors import L2R2Error
from ..images import list_images
from .logits import BranchLogits, Progress, branch_logits

BACKGROUNDS = ("plain", "swapped", "both")
COPIES = 3  # backgrounds per object; a single draw is too noisy with about a hundred images


def backgrounds_in(folder: Path) -> ImageTable:
    """List the images of a folder as background donors: empty frames, scenes, or a data set whose objects are removed.

    Raises:
        L2R2Error: when the folder contains no images.
    """
    if metadata_in(folder) is not None or packed_in(folder):
        return read_table(folder)
    return ImageTable(folder, tuple(Row(path) for path in list_images([folder])))


def default_backgrounds(rows: ImageTable, donors: ImageTable, box_threshold: float, whole: bool = False) -> str:
    """Return `both` if there are objects to paste and enough images to take backgrounds from, else `plain`."""
    objects = any(row.may_have_object(box_threshold) for row in rows.rows)
    return "both" if objects and len(donors_of(donors, box_threshold, whole)) > COPIES else "plain"


def logits_to_fit(
    checkpoint: Checkpoint,
    rows: ImageTable,
    donors: ImageTable,
    backgrounds: str = "plain",
    store: Path | None = None,
    *,
    whole: bool = False,
    skip_bad: bool = False,
    progress: Progress = lambda batches, _: batches,
) -> BranchLogits:
    """Compute the branch logits to fit a fusion on.

    Args:
        checkpoint: the model.
        rows: held-out rows with labels.
        donors: rows whose backgrounds are used, e.g. the training rows.
        backgrounds: `plain` for the unchanged rows, `swapped` for each object on the backgrounds of three other images, or
            `both`. The other images are of any class: with other classes only, the background would be evidence against the
            true class, and a fusion would learn to invert it.
        store: see `branch_logits`.
        whole: see `swapped`.
        skip_bad: see `branch_logits`.
        progress: see `branch_logits`.

    Raises:
        L2R2Error: when `backgrounds` is unknown, or no row has an object to paste onto a background.
    """
    if backgrounds not in BACKGROUNDS:
        raise L2R2Error(f'Unknown backgrounds "{backgrounds}"; choose from {", ".join(BACKGROUNDS)}.')
    parts = []
    if backgrounds != "swapped":
        plain = branch_logits(checkpoint, rows, store, skip_bad=skip_bad, progress=progress)
        parts = [plain]
        rows, donors = (replace(t, rows=tuple(row for row in t.rows if row.path not in plain.bad)) for t in (rows, donors))
    if backgrounds != "plain":
        threshold = checkpoint.box_threshold
        table = swapped(rows, donors, copies=COPIES, classes="any", box_threshold=threshold, whole=whole)
        parts.append(branch_logits(checkpoint, table, store, skip_bad=skip_bad, progress=progress))
    return _joined(parts)


def _joined(parts: list[BranchLogits]) -> BranchLogits:
    return BranchLogits(
        {b: torch.cat([part.logits[b] for part in parts]) for b in parts[0].logits},
        torch.cat([part.has_fg for part in parts]),
        torch.cat([part.labels for part in parts]),
        replace(parts[0].table, rows=tuple(row for part in parts for row in part.table.rows)),
        torch.cat([scores for part in parts if (scores := part.objectness) is not None]),
        {path: why for part in parts for path, why in part.bad.items()},
    )

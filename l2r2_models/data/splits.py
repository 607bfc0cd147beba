"""Hold out validation rows from the training rows."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import L2R2Error
from .table import ImageTable

VAL_FROM = ("random", "end")


def hold_out(
    table: ImageTable, fraction: float, *, group: str | None = None, take: str = "random", seed: int = 0
) -> tuple[ImageTable, ImageTable]:
    """Split a table in two, stratified by class; the objects of one image stay together.

    Args:
        table: rows with labels.
        fraction: fraction of the rows to hold out, above 0 and up to 0.5. With groups, or several rows per image, the held-out
            rows are one of `1 / fraction` (rounded) folds.
        group: a metadata column (site, take, physical object) whose rows with the same value stay together, so that
            near-duplicates are never on both sides; groups that share an image are merged.
        take: `random` rows, or the `end` of each class in the table's order. The latter suits video frames or dated photographs
            without a column for the takes, because neighbors resemble each other.
        seed: random seed; `end` is deterministic.

    Returns:
        The remaining rows and the held-out rows, both in the table's order.

    Raises:
        L2R2Error: when a class would have no training row left, or there are too few groups or rows.
    """
    if take not in VAL_FROM:
        raise L2R2Error(f'Unknown way to hold out rows "{take}"; choose from {", ".join(VAL_FROM)}.')
    if take == "end" and group is not None:
        raise L2R2Error("Rows are held out either from the end of each class or by group; use one or the other.")
    labels = np.array([str(row.label) for row in table.rows])
    held = _end_of_each_class(table, fraction) if take == "end" else _drawn(table, labels, fraction, group, seed)
    out = set(held)
    parts = [tuple(row for i, row in enumerate(table.rows) if (i in out) == side) for side in (False, True)]
    stay, val = (replace(table, rows=rows) for rows in parts)
    if missing := sorted(set(labels) - {str(row.label) for row in stay.rows}):
        how = f"out by {group}" if group else f"{100 * fraction:g} % out"
        raise L2R2Error(
            f"{table.root}: holding {how} would leave no training image of {missing[0]}; hold out less, or add images."
        )
    return stay, val


def _drawn(table: ImageTable, labels: np.ndarray, fraction: float, group: str | None, seed: int) -> list[int]:
    """Positions of the rows to hold out."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit

    images = [str(row.path) for row in table.rows]
    groups = _connected(table.column(group), images) if group else images
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scikit-learn only warns about classes that are too small
            if group is None and len(set(images)) == len(images):
                draw = StratifiedShuffleSplit(1, test_size=fraction, random_state=seed).split(labels, labels)
            else:
                folds = StratifiedGroupKFold(max(2, round(1 / fraction)), shuffle=True, random_state=seed)
                draw = folds.split(labels, labels, groups)
            held: list[int] = next(iter(draw))[1].tolist()
            return held
    except (ValueError, UserWarning) as error:
        what = " ".join(str(error).split())
        raise L2R2Error(f"{table.root}: {100 * fraction:g} % cannot be held out for validation ({what})") from None


def _connected(groups: list[str], images: list[str]) -> list[int]:
    """Group indices of the rows, with groups that share an image merged."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group, image = (np.unique(names, return_inverse=True)[1] for names in (groups, images))
    image = image + group.max() + 1
    size = int(image.max()) + 1
    links = coo_array((np.ones(len(group)), (group, image)), shape=(size, size))
    merged: list[int] = connected_components(links, directed=False)[1][group].tolist()
    return merged


def _end_of_each_class(table: ImageTable, fraction: float) -> list[int]:
    """Positions of the last rows of each class, at least one; an image with several objects counts for the first one's class."""
    label_of: dict[Path, str | None] = {}
    for row in table.rows:
        label_of.setdefault(row.path, row.label)
    images_of: dict[str | None, list[Path]] = {}
    for path, label in label_of.items():
        images_of.setdefault(label, []).append(path)
    held = {path for paths in images_of.values() for path in paths[-max(1, round(fraction * len(paths))) :]}
    return [i for i, row in enumerate(table.rows) if row.path in held]

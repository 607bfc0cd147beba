"""Holding validation rows out of the training rows."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from ..errors import L2R2Error
from .dataset import ImageTable


def hold_out(table: ImageTable, fraction: float, *, group: str | None = None, seed: int = 0) -> tuple[ImageTable, ImageTable]:
    """Split a table in two, classes in equal parts.

    Args:
        table: rows with labels.
        fraction: part of the rows to hold out, above 0 and up to 0.5.
        group: a metadata column (site, take, physical object); rows of one value stay together, so that near-duplicates never
            lie on both sides. The fraction is then met as well as the groups allow.
        seed: of the draw.

    Returns:
        The rows that stay, and those held out, both in the table's order.

    Raises:
        L2R2Error: a class would lose all of its rows on one side, or there are too few groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedShuffleSplit

    labels = np.array([str(row.label) for row in table.rows])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # scikit-learn only warns of classes that are too small
            if group is None:
                draw = StratifiedShuffleSplit(1, test_size=fraction, random_state=seed).split(labels, labels)
            else:
                folds = StratifiedGroupKFold(max(2, round(1 / fraction)), shuffle=True, random_state=seed)
                draw = folds.split(labels, labels, table.column(group))
            _, held = next(iter(draw))
    except (ValueError, UserWarning) as error:
        what = " ".join(str(error).split())
        raise L2R2Error(f"{table.root}: {100 * fraction:g} % cannot be held out for validation ({what})") from None
    out = set(held.tolist())
    parts = [tuple(row for i, row in enumerate(table.rows) if (i in out) == side) for side in (False, True)]
    stay, val = (replace(table, rows=rows) for rows in parts)
    if missing := sorted(set(labels) - {str(row.label) for row in stay.rows}):
        raise L2R2Error(f"{table.root}: holding out by {group} would leave no training image of {missing[0]}.")
    return stay, val

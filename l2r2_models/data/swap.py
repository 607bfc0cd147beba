"""Held-out rows with swapped backgrounds, to fit and choose a fusion for backgrounds that differ from training.

Plain validation rows have the training backgrounds, so a fusion fitted on them trusts the full branch too much (`docs/method.md`,
Fusion; the L2R2 paper reports this on Spawrious). `swapped(val, train)` is an ordinary table: each object of `val`, with its
position and size unchanged, on object-free backgrounds of other images of `train`. `rows_digest` tells it from the original
table. Without masks, the crop to the box is unchanged, so only the prediction of the full branch changes.
"""

from __future__ import annotations

import random
from dataclasses import replace

from ..errors import L2R2Error
from .table import ImageTable, Row


def donors_of(table: ImageTable, box_threshold: float = 0.0, whole: bool = False) -> list[Row]:
    """Return the rows whose backgrounds can be used, see `swapped`."""
    return [row for row in table.whole_images() if row.may_have_object(box_threshold) or (whole and row.is_bare)]


def swapped(
    table: ImageTable,
    donors: ImageTable,
    *,
    copies: int = 1,
    classes: str = "other",
    box_threshold: float = 0.0,
    whole: bool = False,
    seed: int = 0,
) -> ImageTable:
    """Replace the background of each row with an object by those of other images.

    Args:
        table: rows with labels; those without a box or mask are skipped.
        donors: rows whose backgrounds are used; never pass rows on which metrics are reported.
        copies: number of distinct backgrounds per object.
        classes: the classes of an object's donors: `other` classes, the `same` class, or `any` (the latter two are Mixed-Same and
            Mixed-Rand of IN-9; Xiao et al. 2020). An image with objects of several classes counts as another class; an object
            never gets its own image.
        box_threshold: see `sample_of`; use the same value there.
        whole: use donors without boxes and masks as whole backgrounds (empty frames, scenes); otherwise they are skipped, because
            they may contain an object.
        seed: random seed; a row's backgrounds depend on it, on the row's name, and on the donors.

    Returns:
        `copies` consecutive rows for each row with an object, in the table's order.

    Raises:
        L2R2Error: when no row has an object, or a row has fewer than `copies` donors.
    """
    if classes not in ("other", "same", "any"):
        raise L2R2Error(f'Unknown classes of backgrounds "{classes}"; choose from other, same, any.')
    able = donors_of(donors, box_threshold, whole)
    by_label: dict[str | None, list[Row]] = {}
    for row in able:
        by_label.setdefault(row.label, []).append(row)
    others = {label: [row for row in able if row.label != label] for label in {row.label for row in table.rows}}
    made = []
    for name, row in zip(table.names(), table.rows):
        if not row.may_have_object(box_threshold):
            continue
        pool = {"other": others[row.label], "same": by_label.get(row.label, []), "any": able}[classes]
        draw = random.Random(f"background {seed} {name} {row.label}")
        # one more than needed, because the row's own image may be among them
        chosen = [donor for donor in draw.sample(pool, min(len(pool), copies + 1)) if donor.path != row.path][:copies]
        if len(chosen) < copies:
            which = {"other": "another class", "same": f"the class {row.label}", "any": "any class"}[classes]
            raise L2R2Error(
                f"{donors.root}: {name} needs {copies} backgrounds of {which}, but only {len(chosen)} images have one."
            )
        made += [replace(row, background=donor) for donor in chosen]
    if not made:
        raise L2R2Error(f"{table.root}: no image has a box or mask, so there is no object to paste; run `l2r2 localize` first.")
    return replace(table, rows=tuple(made))

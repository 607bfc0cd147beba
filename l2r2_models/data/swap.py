"""Held-out rows with other backgrounds: what to fit and choose a fusion on, when backgrounds will differ from training.

Plain validation rows have the training backgrounds, so whatever is fitted on them trusts the full branch too much (METHOD.md 4;
L2R2 met it on Spawrious). `swapped(val, train)` is an ordinary table: each object of `val`, at its own place and size, on the
object-free backgrounds of other images of `train`. It goes wherever a table goes, `evaluate.logits.branch_logits` and
its store included; `rows_digest` tells it from the table it was made of. Without masks the crop to the box stays the same to
the pixel, so the fg branch says what it said, and only the full branch meets something new.
"""

from __future__ import annotations

import random
from dataclasses import replace

from ..errors import L2R2Error
from .table import ImageTable, Row


def donors_of(table: ImageTable, box_threshold: float = 0.0, whole: bool = False) -> list[Row]:
    """The images that can give a background, see `swapped`."""
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
    """Give every row with an object the backgrounds of other images.

    Args:
        table: rows with labels; those without a box or mask are left out.
        donors: rows that give backgrounds; never rows that a figure is reported on.
        copies: backgrounds for each object, all different.
        classes: which donors an object may get: of `other` classes, of the `same` class, or `any` (the latter two are Mixed-Same
            and Mixed-Rand of IN-9; Xiao et al. 2020). Its own image never; one with objects of several classes is another class.
        box_threshold: see `sample_of`; use the same value there.
        whole: donors without boxes and masks are backgrounds as they are (empty frames, scenes); else they give none, because an
            object may be on them.
        seed: of the draw; a row's backgrounds depend on it, the row's name, and the donors.

    Returns:
        `copies` rows for each that has an object, in the table's order, the copies of a row one after another.

    Raises:
        L2R2Error: no row has an object, or some row has fewer than `copies` donors.
    """
    if classes not in ("other", "same", "any"):
        raise L2R2Error(f'Backgrounds can be of classes "other", "same" or "any", not "{classes}".')
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
        # one more than needed, for the row's own image may be among them
        chosen = [donor for donor in draw.sample(pool, min(len(pool), copies + 1)) if donor.path != row.path][:copies]
        if len(chosen) < copies:
            which = {"other": "another class", "same": f"the class {row.label}", "any": "any class"}[classes]
            raise L2R2Error(f"{donors.root}: {name} needs {copies} backgrounds of {which}, {len(chosen)} images can give one.")
        made += [replace(row, background=donor) for donor in chosen]
    if not made:
        raise L2R2Error(f"{table.root}: no image has a box or mask, so there is no object to lay on another background.")
    return replace(table, rows=tuple(made))

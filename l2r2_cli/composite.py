"""`l2r2 composite`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from .common import names, say, track
from .options import Seed


def composite(
    objects: Annotated[Path, typer.Argument(help="Data set of objects with labels, masks, and splits train and test.")],
    scenes: Annotated[Path, typer.Argument(help="Data set of backgrounds with their kind as label, and splits train and test.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder; rerun to resume.")],
    correlation: Annotated[
        str, typer.Option(help="Fraction of a class's training images on its home scene, one number per environment.")
    ] = "0.97,0.87",
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 128,
    copies: Annotated[int, typer.Option(help="Composites per photograph, in each environment and test split.")] = 1,
    val_objects: Annotated[int, typer.Option(help="Physical objects per class to hold out as val.")] = 1,
    object_column: Annotated[str, typer.Option(help="Metadata column that names the physical object.")] = "object_instance",
    seed: Seed = 0,
) -> None:
    """Make a data set whose backgrounds predict the class in training and are misleading in the test (Spawrious protocol)."""
    from l2r2_models.data.spawrious import composites
    from l2r2_models.data.table import read_table
    from l2r2_models.errors import L2R2Error

    try:
        parts = [float(part) for part in names(correlation) or ()]
    except ValueError:
        raise L2R2Error(f'--correlation takes comma-separated numbers such as 0.97,0.87, got "{correlation}".') from None
    composites(
        objects,
        scenes,
        out,
        correlation=parts,
        size=size,
        copies=copies,
        val_objects=val_objects,
        object_column=object_column,
        seed=seed,
        progress=lambda items, total: track(items, total, "composing"),
    )
    counts = Counter(row.split for row in read_table(out).rows)
    say(f"wrote {out}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))

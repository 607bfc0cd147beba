"""`l2r2 prior`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import count, names, say
from .options import Data, Metadata


class Action(str, Enum):
    """What to do with a prior."""

    fit = "fit"


def prior(
    action: Annotated[Action, typer.Argument(help="fit: count the labels of a data set.", metavar="fit")],
    data: Data,
    columns: Annotated[
        str, typer.Option(help="Metadata columns, e.g. habitat,month:12; the number is the period of a column that repeats.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file to write, for --prior of predict and evaluate.")],
    split: Annotated[Optional[str], typer.Option(help="Split to count.", show_default="train, or all")] = None,
    val_split: Annotated[
        Optional[str],
        typer.Option(
            help="Held-out split to choose the smoothing and the combination of columns on.", show_default="val, if any"
        ),
    ] = None,
    metadata: Metadata = None,
) -> None:
    """Count how often each class occurs with the metadata of an image, to correct predictions with it. No image is read."""
    from l2r2_models.evaluate.fit_prior import fit_prior

    fitted, found = fit_prior(data, names(columns) or (), out, split=split, val_split=val_split, metadata=metadata)
    for (joint, smoothing), likelihood in found.items():
        chosen = "  <- chosen" if (joint, smoothing) == (fitted.joint, fitted.smoothing) else ""
        how = "joint" if joint else "independent"
        say(f"  {how:12} smoothing {smoothing:4g}  log-likelihood of held-out labels {likelihood:7.3f}{chosen}")
    rows = int(sum(n for counts in fitted.cells.values() for n in counts.values()))
    say(f"counted {count(rows, 'image')} of {len(fitted.labels)} classes, {count(len(fitted.cells), 'combination')} of values")
    say(f"wrote {out}")

"""`l2r2 demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .common import say, show
from .options import Seed


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything; rerun to resume.")] = Path("demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 3,
    seed: Seed = 0,
) -> None:
    """Fine-tune a plain classifier and L2R2 on synthetic images, swap the backgrounds, and compare."""
    from rich.table import Table

    from l2r2_models.demo import SPLITS, run_demo

    start = time.monotonic()
    result = run_demo(out, epochs=epochs, seed=seed, say=say)
    table = Table("accuracy", "usual backgrounds", "swapped backgrounds", title="Handwritten digits on photographs")
    for name, row in result.accuracy.items():
        table.add_row(name, *(f"{100 * row[split]:.1f} %" for split in SPLITS))
    show(table)
    say(f"predictions: {result.predictions}   picture: {result.picture}   ({time.monotonic() - start:.0f} s)")

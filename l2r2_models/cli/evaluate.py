"""`l2r2 evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import track


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's folder, or a Hub id (org/name).")],
    data: Annotated[Path, typer.Argument(help="A data set, see `l2r2 finetune`.")],
    split: Annotated[str, typer.Option(help="Rows to judge by.")] = "test",
    group: Annotated[Optional[str], typer.Option(help="Metadata column: accuracy by its values, and the worst.")] = None,
    fit_split: Annotated[Optional[str], typer.Option(help="Held-out rows to fit every fusion on, for comparison.")] = None,
    prior: Annotated[
        Optional[str], typer.Option(help="Metadata column to correct the answers by, counted on the training rows.")
    ] = None,
    metadata: Annotated[Optional[Path], typer.Option(help="Another metadata file for the images of DATA.")] = None,
    boxes: Annotated[Optional[Path], typer.Option(help="Box file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge every branch and every fusion of a run: accuracy, macro accuracy, calibration, groups."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluate.judge import evaluate_run

    result = evaluate_run(
        run, data, split, group=group, fit_split=fit_split, prior=prior, metadata=metadata, boxes=boxes,
        progress=lambda batches, total: track(batches, total, "branch logits"),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    columns = {"accuracy": "accuracy", "macro_accuracy": "macro", "ece": "ECE", "with_box": "with box", "without_box": "without"}
    if group:
        columns["worst_group"] = f"worst {group}"
    table = Table("in %", box=None, header_style="bold", pad_edge=False)
    for title in columns.values():
        table.add_column(title, justify="right")
    groups = list(next(iter(result.rows.values())).get("by_group", {}))
    for name in groups:
        table.add_column(name, justify="right")
    for name, figures in result.rows.items():
        values = [figures[key] for key in columns] + [figures["by_group"][g] for g in groups]
        table.add_row(name, *("" if v is None else f"{100 * v:.1f}" for v in values))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    fitted = f"; fusions fitted on {result.fitted_on}" if result.fitted_on else ""
    typer.echo(
        f"{result.images} images of {result.split}, {result.with_object} with an object found; "
        f"either branch right (oracle): {100 * result.oracle:.1f}{fitted}"
    )

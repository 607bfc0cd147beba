"""`l2r2 evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import errors, track


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
    from rich.markup import escape
    from rich.table import Table

    from ..evaluate.judge import evaluate_run
    from ..model import BRANCHES

    result = evaluate_run(
        run, data, split, group=group, fit_split=fit_split, prior=prior, metadata=metadata, boxes=boxes,
        progress=lambda batches, total: track(batches, total, "branch logits"),
    )  # fmt: skip
    for warning in result.warnings:
        errors.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    columns = {"accuracy": "accuracy", "macro_accuracy": "macro", "ece": "ECE", "with_box": "with box", "without_box": "without"}
    if group:
        columns["worst_group"] = f"worst {group}"
    table = Table("in %", box=None, header_style="bold", pad_edge=False)
    for title in columns.values():
        table.add_column(title, justify="right")
    for name, figures in result.rows.items():
        table.add_row(escape(name), *("" if figures[k] is None else f"{100 * figures[k]:.1f}" for k in columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
    if group:
        own = [name for name in result.rows if name in BRANCHES or name.startswith("fused: ")]
        by_group = Table(escape(f"accuracy by {group}"), *own, box=None, header_style="bold", pad_edge=False)
        for value in next(iter(result.rows.values()))["by_group"]:
            reached = [result.rows[name]["by_group"][value] for name in own]
            by_group.add_row(escape(value) or "(empty)", *(f"{100 * v:.1f}" for v in reached))
        console.print(by_group)
    fitted = f"; fusions fitted on {result.fitted_on}" if result.fitted_on else ""
    typer.echo(
        f"{result.images} images of {result.split}, {result.with_object} with an object found; "
        f"either branch right (oracle): {100 * result.oracle:.1f}{fitted}"
    )

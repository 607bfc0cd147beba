"""`l2r2 fuse`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import errors, track


def fuse(
    run: Annotated[Path, typer.Argument(help="A run's folder; the fitted fusion is saved into it.")],
    data: Annotated[Path, typer.Argument(help="A data set, see `l2r2 finetune`.")],
    split: Annotated[str, typer.Option(help="Held-out rows to fit on, never the rows to be judged by.")] = "val",
    method: Annotated[Optional[str], typer.Option(help="A fusion.", show_default="best_on_val, the best of all")] = None,
    class_wise: Annotated[bool, typer.Option("--class-wise", help="One temperature a class, where a fusion scales.")] = False,
    metadata: Annotated[Optional[Path], typer.Option(help="Another metadata file for the images of DATA.")] = None,
    boxes: Annotated[Optional[Path], typer.Option(help="Box file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show; leave the run as it is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit the fusion of a run on held-out rows, from branch logits that are computed once and stored."""
    from ..evaluate.fit_run import fit_run

    report = fit_run(
        run, data, split, method=method, class_wise=class_wise, metadata=metadata, boxes=boxes, save=not dry_run,
        progress=lambda batches, total: track(batches, total, "branch logits"),
    )  # fmt: skip
    for warning in report.warnings:
        errors.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    typer.echo(f"fitted on {report.rows} images of {split}, {report.with_object} with an object; on unseen fifths of them, in %:")
    typer.echo(f"  {'fusion':26} {'right':>5}  {'ECE':>5}")
    for name, (accuracy, ece, numbers) in report.table.items():
        mark = "  <- chosen" if name == report.chosen else ""
        typer.echo(f"  {name:26} {100 * accuracy:5.1f}  {100 * ece:5.1f}  {numbers:>6} numbers{mark}")
    typer.echo(f"{'would change' if dry_run else 'saved into'} {run}: {json.dumps(report.config)}")

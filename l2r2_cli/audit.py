"""`l2r2 audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import cell, errors, say, show, track

if TYPE_CHECKING:
    from l2r2_models.audit.audit import Audit
    from l2r2_models.audit.metrics import Estimate


def audit(
    model: Annotated[str, typer.Argument(help="timm:NAME, a folder in timm's layout, a run's folder, or a Hub id (org/name).")],
    data: Annotated[Path, typer.Argument(help="A data set with boxes or masks, see `l2r2 finetune`.")],
    split: Annotated[Optional[str], typer.Option(help="Rows to judge by.", show_default="test, or all")] = None,
    group: Annotated[Optional[str], typer.Option(help="Metadata column: accuracy by its values, and the worst.")] = None,
    boxes: Annotated[Optional[Path], typer.Option(help="Box file.")] = None,
    metadata: Annotated[Optional[Path], typer.Option(help="Another metadata file for the images of DATA.")] = None,
    labels: Annotated[
        Optional[Path], typer.Option(help="Names of a plain model's classes, one a line.", show_default="its own, or ImageNet's")
    ] = None,
    classes: Annotated[
        Optional[Path], typer.Option(help="CSV class,model_class: the data's classes, the model's.", show_default="by name")
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="At most so many images, drawn with the seed.")] = None,
    backgrounds: Annotated[int, typer.Option(min=1, help="Random backgrounds for each object.")] = 5,
    challenge: Annotated[
        bool, typer.Option("--challenge", help="Also try every other image's background on each object (IN-9; slow).")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of images, noise, backgrounds and intervals.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out.")] = False,
    work: Annotated[
        Optional[Path], typer.Option(help="Folder for what is done so far.", show_default="RUN/audit, or the user's cache")
    ] = None,
    report: Annotated[Optional[Path], typer.Option(help="HTML page to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How much any classifier leans on the background: other backgrounds, erased objects, noise. Needs boxes or masks.

    Every model sees whole images, padded to a square and resized (no center crop); an L2R2 run also sees the object cut out of
    the changed image. Some 40 passes per image; interrupted, the same command continues.
    """
    from l2r2_models.audit.audit import run_audit

    audited = run_audit(
        model,
        data,
        split=split,
        group=group,
        boxes=boxes,
        metadata=metadata,
        labels=labels,
        classes=classes,
        limit=limit,
        backgrounds=backgrounds,
        challenge=challenge,
        seed=seed,
        skip_bad=skip_bad,
        work=work,
        progress=track,
    )
    result = audited.result
    for warning in result.warnings:
        errors.print(f"warning: {warning}")
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print(result)
    if report is not None:
        from l2r2_models.report.audit import write_report

        write_report(report, audited)
        errors.print(f"wrote {report}")


def _print(result: Audit) -> None:
    from rich.table import Table

    rows = {
        "accuracy": "accuracy",
        "mixed_same": "Mixed-Same: background of its class",
        "mixed_rand": "Mixed-Rand: of a random class",
        "mixed_next": "Mixed-Next: of the next class",
        "bg_gap": "BG-Gap: Mixed-Same - Mixed-Rand",
        "challenge": "challenge: right on every background",
        "challenge_upper_bound": f"challenge, upper bound: right on {result.settings['backgrounds']}",
        "fg_only": "fg only: background erased",
        "bg_only_mask": "bg only: mask erased",
        "bg_only_box": "bg only: box erased",
        "tiled": "tiled over",
        "drop_bg_only_mask": "relative drop, mask erased",
        "drop_bg_only_box": "relative drop, box erased",
        "drop_tiled": "relative drop, tiled over",
        "rfs": "RFS",
        "irfs": "iRFS",
        "rfs_l2": "RFS, noise of one L2 norm",
        "irfs_l2": "iRFS, noise of one L2 norm",
        "worst_group": f"worst {result.groups}",
    }
    table = Table(f"in % (95 % interval), {result.images} images of {cell(result.split)}", box=None, header_style="bold")
    for name in result.answers:
        table.add_column(name, justify="right")
    for name, words in rows.items():
        if any(name in figures for figures in result.answers.values()):
            table.add_row(cell(words), *(_cell(figures.get(name), "rfs" in name) for figures in result.answers.values()))
    show(table)
    say(result.verdict)


def _cell(figure: Estimate | None, plain: bool) -> str:
    if figure is None:
        return ""
    scale, digits = (1, 2) if plain else (100, 1)
    value, low, high = (f"{scale * v:.{digits}f}" for v in (figure.value, figure.low, figure.high))
    return f"{value} ({low} to {high})"

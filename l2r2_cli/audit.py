"""`l2r2 audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .common import cell, check_explanations, errors, on_ray, say, show, track
from .options import Address, Boxes, Data, Engine, Explanations, Group, Json, Metadata, Report, Seed, SkipBad, Workers

if TYPE_CHECKING:
    from l2r2_models.audit.audit import Audit
    from l2r2_models.audit.metrics import Estimate


def audit(
    model: Annotated[
        str,
        typer.Argument(help="timm:NAME, a folder in timm's layout, a run folder, a Hub id (ORG/NAME), or vlm:MODEL?names=FILE."),
    ],
    data: Data,
    split: Annotated[Optional[str], typer.Option(help="Split to audit on.", show_default="test, or all")] = None,
    group: Group = None,
    boxes: Boxes = None,
    metadata: Metadata = None,
    labels: Annotated[
        Optional[Path], typer.Option(help="Class names of a plain model, one per line.", show_default="its own, or ImageNet's")
    ] = None,
    classes: Annotated[
        Optional[Path],
        typer.Option(help="CSV file class,model_class: maps the data's classes.", show_default="by name"),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use at most this many images, drawn at random.")] = None,
    backgrounds: Annotated[int, typer.Option(min=1, help="Random backgrounds per object.")] = 5,
    challenge: Annotated[
        bool, typer.Option("--challenge", help="Also try every other image's background on each object (IN-9; slow).")
    ] = False,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    work: Annotated[
        Optional[Path], typer.Option(help="Folder for intermediate results.", show_default="RUN/audit, or the user's cache")
    ] = None,
    workers: Workers = None,
    report: Report = None,
    explanations: Explanations = None,
    as_json: Json = False,
    engine: Engine = "local",
    address: Address = None,
) -> None:
    """Measure how much a classifier relies on backgrounds: swapped backgrounds, erased objects, noise. Needs boxes or masks.

    Every model gets whole images, padded to a square and resized (no center crop); an L2R2 run also gets the object cut out of
    the changed image. About 40 forward passes per image; an interrupted audit continues with the same command.
    """
    check_explanations(explanations, report)
    from l2r2_models.audit.audit import run_audit
    from l2r2_models.errors import L2R2Error
    from l2r2_models.runs import WEIGHTS, store_audit

    how: dict[str, Any] = {"workers": workers}
    if on_ray(engine, address):
        from l2r2_models.scale import answers_on_ray

        how = {"compute": answers_on_ray(address, workers)}
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
        **how,
    )
    result = audited.result
    for warning in result.warnings:
        errors.print(f"warning: {warning}")
    if (Path(model) / WEIGHTS).is_file():  # stored for the model card
        try:
            store_audit(model, data, result.to_dict())
        except L2R2Error as error:
            errors.print(f"warning: {error} This audit will be missing from the model card of this run.")
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        _print(result)
    if report is not None:
        from l2r2_models.report.audit import write_report

        write_report(report, audited, explanations)
        errors.print(f"wrote {report}")


def _print(result: Audit) -> None:
    from rich.table import Table

    rows = {
        "accuracy": "accuracy",
        "mixed_same": "Mixed-Same: background of its class",
        "mixed_rand": "Mixed-Rand: of a random class",
        "mixed_next": "Mixed-Next: of the next class",
        "bg_gap": "BG-Gap: Mixed-Same - Mixed-Rand",
        "challenge": "challenge: correct on every background",
        "challenge_upper_bound": f"challenge, upper bound: correct on {result.settings['backgrounds']}",
        "fg_only": "fg only: background erased",
        "bg_only_mask": "bg only: mask erased",
        "bg_only_box": "bg only: box erased",
        "tiled": "tiled: box filled in",
        "drop_bg_only_mask": "relative drop, mask erased",
        "drop_bg_only_box": "relative drop, box erased",
        "drop_tiled": "relative drop, tiled",
        "rfs": "RFS",
        "irfs": "iRFS",
        "rfs_l2": "RFS, noise of equal L2 norm",
        "irfs_l2": "iRFS, noise of equal L2 norm",
        "worst_group": f"worst {result.groups}",
    }
    table = Table(f"in % (95 % interval), {result.images} images of {cell(result.split)}", box=None, header_style="bold")
    for name in result.answers:
        table.add_column(name, justify="right")
    for name, words in rows.items():
        if any(name in estimates for estimates in result.answers.values()):
            table.add_row(cell(words), *(_cell(estimates.get(name), "rfs" in name) for estimates in result.answers.values()))
    show(table)
    say(result.verdict)


def _cell(estimate: Estimate | None, plain: bool) -> str:
    if estimate is None:
        return ""
    scale, digits = (1, 2) if plain else (100, 1)
    value, low, high = (f"{scale * v:.{digits}f}" for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"

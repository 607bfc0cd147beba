"""`l2r2 evaluate-boxes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import errors, say, track


def evaluate_boxes(
    boxes: Annotated[Path, typer.Argument(help="Box file of a localizer.")],
    data: Annotated[Path, typer.Argument(help="A data set whose metadata have the true boxes or masks.")],
    split: Annotated[Optional[str], typer.Option(help="Only this split.")] = None,
    metadata: Annotated[Optional[Path], typer.Option(help="Another metadata file for the images of DATA.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Boxes with a lower score count as not found.")] = 0.2,
    pictures: Annotated[Optional[Path], typer.Option(help="Write a sheet of the ten worst images here (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge a localizer's boxes: overlap with the true ones, CorLoc, how much of the object they hold, misses."""
    from l2r2_models.evaluate.localization import draw_worst
    from l2r2_models.evaluate.localization import evaluate_boxes as judge

    report = judge(
        boxes,
        data,
        split=split,
        metadata=metadata,
        threshold=threshold,
        progress=lambda steps, total: track(steps, total, "comparing boxes"),
    )
    for why in report.unreadable.values():
        errors.print(f"left out: {why}")
    if pictures is not None:
        draw_worst(report, pictures)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    low, high = report.corloc_interval
    name = f"{report.localizer or boxes}{' with the true labels as prompts (oracle)' if report.oracle else ''}"
    say(f"{name}: {report.images} images with a true box")
    say(f"  CorLoc@0.5        {100 * report.corloc:5.1f} %   ({100 * low:.1f} to {100 * high:.1f})")
    say(f"  mean IoU          {100 * report.mean_iou:5.1f} %   median {100 * report.quantiles['0.5']:.1f}")
    say(f"  object inside box {100 * report.area_recall:5.1f} %")
    say(f"  nothing found in  {report.missed:5d}     ({report.failed} failed, {report.unlisted} not in the file)")
    if report.empty:
        say(f"  {report.false_boxes} of {report.empty} images without a true box got one")
    longest = max(report.histogram)
    for i, count in enumerate(report.histogram):
        say(f"  IoU {i / 10:.1f} to {(i + 1) / 10:.1f}  {count:6d}  {'#' * round(40 * count / longest)}")
    if pictures is not None:
        say(f"wrote {pictures}")

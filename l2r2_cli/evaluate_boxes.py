"""`l2r2 evaluate-boxes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import errors, say, track
from .options import Json, Metadata, Split, box_threshold


def evaluate_boxes(
    boxes: Annotated[Path, typer.Argument(help="Box file to evaluate.")],
    data: Annotated[Path, typer.Argument(help="Data set whose metadata contains the true boxes or masks.")],
    split: Split = None,
    metadata: Metadata = None,
    box_threshold: Annotated[float, box_threshold(True)] = 0.2,
    pictures: Annotated[Optional[Path], typer.Option(help="Write a PNG with the ten worst images to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a box file with the true boxes: IoU, CorLoc, recall of the object's area, missed objects."""
    from l2r2_models.evaluate.localization import draw_worst
    from l2r2_models.evaluate.localization import evaluate_boxes as run

    report = run(
        boxes,
        data,
        split=split,
        metadata=metadata,
        threshold=box_threshold,
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
        say(f"  {report.false_boxes} of {report.empty} images without a true box have a found one")
    longest = max(report.histogram)
    for i, count in enumerate(report.histogram):
        say(f"  IoU {i / 10:.1f} to {(i + 1) / 10:.1f}  {count:6d}  {'#' * round(40 * count / longest)}")
    if pictures is not None:
        say(f"wrote {pictures}")

"""`l2r2 benchmark`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import columns, errors, numbers, say, track
from .options import BatchSize, Boxes, Cascade, Device, Json, Precision, Run, SkipBad, Split, Workers

if TYPE_CHECKING:
    from l2r2_models.predict.benchmark import Benchmark


def benchmark(
    model: Run,
    images: Annotated[
        Optional[list[Path]],
        typer.Argument(help="Images, folders of images, or data sets.", show_default="synthetic photos"),
    ] = None,
    boxes: Boxes = None,
    split: Split = None,
    limit: Annotated[int, typer.Option(min=1, help="Use at most this many images, evenly spaced.")] = 256,
    size: Annotated[str, typer.Option(help="Size of synthetic photos, WIDTHxHEIGHT.")] = "500x400",
    repeats: Annotated[int, typer.Option(min=1, help="Number of rounds; the median is reported.")] = 3,
    plain: Annotated[bool, typer.Option(help="Also measure a plain timm network with the same backbone.")] = True,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    precision: Precision = "fp32",
    cascade: Cascade = None,
    device: Device = None,
    profile: Annotated[
        Optional[Path],
        typer.Option(
            help="Also profile the stages with torch: write the trace to this file (.json), and print the slowest operators."
        ),
    ] = None,
    sizes: Annotated[
        Optional[str],
        typer.Option(
            help="Instead, compare the accuracy and the time of view sizes, e.g. 96,128,224, on held-out rows of a data set.",
        ),
    ] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Measure how long each stage of a prediction takes: decode, cut, network, fuse, write.

    With --sizes, measure which view sizes per branch are worth their time.
    """
    if sizes is not None:
        if profile is not None or cascade is not None or precision != "fp32" or device is not None:
            raise typer.BadParameter("--sizes compares sizes alone; leave out --profile, --cascade, --precision and --device")
        _compare_sizes(model, images or [], numbers("--sizes", sizes), boxes, split, skip_bad, workers, repeats, as_json)
        return
    if skip_bad:
        raise typer.BadParameter("--skip-bad belongs to --sizes; without it, unreadable images are reported")
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 10_000 and 0 < int(height) <= 10_000):
        raise typer.BadParameter(f"--size is WIDTHxHEIGHT in pixels, e.g. 4000x3000, got {size}")
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "5"
    )  # read when torch is imported; its profiler logs an error where there is no GPU
    from l2r2_models.predict.benchmark import run_benchmark, synthetic_photos
    from l2r2_models.predict.inputs import gather
    from l2r2_models.predict.predictor import Predictor
    from l2r2_models.predict.profiling import profile_stages

    predictor = Predictor.from_pretrained(
        model, batch_size=batch_size, workers=workers, precision=precision, cascade=cascade, device=device
    )
    with TemporaryDirectory() as folder:
        if images:
            inputs = gather(images, boxes, split).evenly(limit)
        else:
            inputs = synthetic_photos(Path(folder), limit, (int(width), int(height)))
        found = run_benchmark(
            predictor, inputs, repeats=repeats, plain=plain, progress=lambda steps, total: track(steps, total, "rounds")
        )
        table = "" if profile is None else profile_stages(predictor, inputs, profile)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    _print(found)
    if profile is not None:
        typer.echo(table)
        say(f"wrote {profile}")


def _print(found: Benchmark) -> None:
    shares = found.shares()
    rows = [("stage", "ms/image", "share")]
    rows += [(stage, f"{1e3 * seconds:.2f}", f"{100 * shares[stage]:.0f} %") for stage, seconds in found.stages.items()]
    for line in columns(rows, right=(1, 2)):
        say(line)
    cascade = "" if found.cascade is None else f", cascade {found.cascade:g}"
    how = f"{found.device}, {found.workers} workers, {found.precision}{cascade}"
    say(f"{found.images} images, {found.objects} objects, {found.rows:.2f} views per image through the backbone; {how}")
    beside = f"; a plain timm network: {found.plain:.1f}, {found.plain / found.rate:.2f} times as many" if found.plain else ""
    say(f"{found.rate:.1f} images/s{beside}; peak memory {found.memory / 2**30:.1f} GiB")


def _compare_sizes(
    run: str,
    images: list[Path],
    sizes: tuple[int, ...],
    boxes: Path | None,
    split: str | None,
    skip_bad: bool,
    workers: int | None,
    repeats: int,
    as_json: bool,
) -> None:
    if len(images) != 1 or not sizes:
        raise typer.BadParameter("--sizes takes comma-separated sides in pixels, and compares them on one data set with labels")
    from l2r2_models.evaluate.sizes import compare_sizes

    found = compare_sizes(
        run,
        images[0],
        sizes,
        split=split or "val",
        boxes=boxes,
        skip_bad=skip_bad,
        workers=workers,
        repeats=repeats,
        progress=lambda batches, total: track(batches, total, "branch logits"),
    )
    for warning in found.warnings:
        errors.print(f"warning: {warning}")
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    rows = [(*found.chosen.sizes, "accuracy", "behind the best", "ms/image", "")]
    for row in found.rows:
        note = " ".join(word for word, holds in (("chosen", row == found.chosen), ("now", row == found.current)) if holds)
        behind = f"{100 * row.behind:.1f} +- {100 * row.error:.1f}"
        rows.append((*map(str, row.sizes.values()), f"{100 * row.accuracy:.1f}", behind, f"{1e3 * row.seconds:.2f}", note))
    for line in columns(rows, right=range(len(rows[0]) - 1)):
        say(line)
    say(f"{found.images} images; accuracy in %, time of the network alone")
    if found.chosen == found.current:
        say("keep the sizes of the run: no faster ones are as accurate, within one standard error")
        return
    words = ", ".join(f"{branch}: {side}" for branch, side in found.chosen.sizes.items())
    gain = found.current.seconds / found.chosen.seconds
    say(f"the fastest sizes within one standard error of the best take 1/{gain:.1f} of the time of the present ones")
    say(f'train with them: l2r2 finetune {images[0]} --init {run} --set "sizes={{{words}}}" -o NEW')

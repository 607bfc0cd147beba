"""`l2r2 benchmark`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .common import columns, say, track
from .options import BatchSize, Boxes, Cascade, Device, Json, Precision, Run, Split, Workers

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
    as_json: Json = False,
) -> None:
    """Measure how long each stage of a prediction takes: decode, cut, network, fuse, write."""
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 10_000 and 0 < int(height) <= 10_000):
        raise typer.BadParameter(f"--size is WIDTHxHEIGHT in pixels, e.g. 4000x3000, got {size}")
    from l2r2_models.predict.benchmark import run_benchmark, synthetic_photos
    from l2r2_models.predict.inputs import gather
    from l2r2_models.predict.predictor import Predictor

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
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found)


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

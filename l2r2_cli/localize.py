"""`l2r2 localize`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .common import columns, count, errors, on_ray, say, track
from .options import Address, BatchSize, Device, Engine, Json, Split, Workers

if TYPE_CHECKING:
    from l2r2_models.localize import LocalizerSpec


def _show_presets(show: bool) -> None:
    if not show:
        return
    from l2r2_models.localize import PRESETS, LocalizerSpec

    head = ("preset", "for", "model", "threshold", "license")
    rows = [(name, p.use, LocalizerSpec.parse(p.spec).source, p.threshold, p.license) for name, p in PRESETS.items()]
    for line in columns([head, *rows]):
        say(line)
    raise typer.Exit


def localize(
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, or data sets.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Box file to write, .json or .parquet; with --engine ray, a folder of Parquet. Rerun to resume."
        ),
    ],
    localizer: Annotated[
        Optional[str],
        typer.Option(
            help="camera-trap or prompt (see --presets); or NAME[:SOURCE][?option=value&...]: owlv2, grounding-dino, "
            "omdet-turbo, florence2, sam3, detr, outlier, ncut, attn, head, mask-head, boxes, ...",
            show_default="prompt",
        ),
    ] = None,
    presets: Annotated[
        bool,
        typer.Option(
            "--presets", callback=_show_presets, is_eager=True, help="Show model, threshold and license of each preset."
        ),
    ] = False,
    prompt: Annotated[Optional[list[str]], typer.Option(help="What to look for. Repeatable.")] = None,
    oracle_prompts: Annotated[
        bool,
        typer.Option("--oracle-prompts", help="Prompt with each image's true label; for analysis only, recorded in the file."),
    ] = False,
    split: Split = None,
    format: Annotated[str, typer.Option(help="Format of a .json file: megadetector or coco.")] = "megadetector",
    batch_size: BatchSize = 8,
    workers: Workers = None,
    device: Device = None,
    as_json: Json = False,
    engine: Engine = "local",
    address: Address = None,
) -> None:
    """Find objects in images and write a box file that finetune, evaluate and predict read.

    Under torchrun (`torchrun --standalone --nproc_per_node 8 -m l2r2_models localize ...`), the processes share the images.
    """
    from l2r2_models.errors import L2R2Error
    from l2r2_models.localize import DEFAULT, LocalizerSpec, create_localizer
    from l2r2_models.localize.localize_files import localize_to_file
    from l2r2_models.predict.inputs import gather

    spec = LocalizerSpec.parse(localizer or DEFAULT)
    spec = spec.with_option("prompt", *prompt) if prompt else spec
    if on_ray(engine, address):
        if oracle_prompts or device or format != "megadetector":
            raise typer.BadParameter("--engine ray writes parquet, without --oracle-prompts, --device and --format")
        _localize_on_ray(images, spec, out, as_json, split=split, address=address, actors=workers, batch_size=batch_size)
        return
    inputs = gather(images, split=split)
    if oracle_prompts and (lacking := [path for path in inputs.paths if str(path) not in inputs.labels]):
        raise L2R2Error(f"--oracle-prompts needs a label for every image in the metadata; {lacking[0]} has none.")
    first = os.environ.get("RANK", "0") == "0"
    finder = create_localizer(spec, device=device)
    report = localize_to_file(
        finder,
        inputs.paths,
        out,
        format=format,
        batch_size=batch_size,
        prompts=inputs.labels if oracle_prompts else None,
        workers=workers,
        progress=lambda steps, total: track(steps, total, "localizing") if first else steps,
    )
    if not first:
        return
    total, failed = len(report.entries), len(report.failures)
    before = f", {report.kept} of them from before" if report.kept else ""
    counts = {"images": total, "with_box": report.with_box, "failed": failed, "from_before": report.kept}
    _print(out, as_json, f"{count(total, 'image')}{before}", counts, report.failures.values(), finder.info)


def _print(
    out: Path, as_json: bool, images: str, counts: dict[str, int], failures: Iterable[str], info: Mapping[str, Any]
) -> None:
    """Print the failures and the summary; exit with 1 if there are failures."""
    for why in failures:
        errors.print(f"failed: {why}")
    with_box, failed = counts["with_box"], counts["failed"]
    if as_json:
        about = {"license": None, **info}  # null: the license is not known here
        typer.echo(json.dumps({"boxes": str(out), **counts, **{key: about[key] for key in ("localizer", "license")}}))
    else:
        say(f"{images}: {with_box} with a box, {counts['images'] - with_box - failed} without; {failed} failed")
        say(f"wrote {out}")
    if failed:
        raise typer.Exit(1)


def _localize_on_ray(images: list[Path], spec: LocalizerSpec, out: Path, as_json: bool, **options: Any) -> None:
    """Localize with Ray Data, and print the summary."""
    from l2r2_models.scale import localize as localize_partitions

    bar = lambda items, total: track(items, total, "localizing partitions")  # noqa: E731
    report = localize_partitions(images, spec, out, progress=bar, **options)
    tally = report.tally
    where = f"{count(tally.images, 'image')} in {count(report.partitions, 'partition')}, {report.kept} of them from before"
    counts = {"images": tally.images, "with_box": tally.found, "failed": tally.failed, "partitions_from_before": report.kept}
    _print(out, as_json, where, counts, tally.reasons, report.header)

"""`l2r2 export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import say
from .options import Json, Run


def export(
    run: Run,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, e.g. model.onnx.")],
    format: Annotated[
        Optional[str], typer.Option(help="onnx or torch-export.", show_default="from the suffix, .onnx or .pt2")
    ] = None,
    takes: Annotated[
        str,
        typer.Option("--input", help="views, or image: one image and its boxes, cut inside the graph."),
    ] = "views",
    fp16: Annotated[bool, typer.Option("--fp16", help="Export the network in half precision.")] = False,
    as_json: Json = False,
) -> None:
    """Export a run for other runtimes and compare the file's outputs with PyTorch's."""
    from l2r2_models.checkpoints.export import FORMATS, export_run
    from l2r2_models.errors import L2R2Error

    named = {suffix: name for name, suffix in FORMATS.items()}
    if format is None and out.suffix not in named:
        raise L2R2Error(f"{out}: name the file {' or '.join('*' + s for s in named)}, or pass --format.")
    result = export_run(run, out, format=format or named[out.suffix], takes=takes, fp16=fp16)
    if as_json:
        typer.echo(json.dumps({**vars(result), "file": str(result.file)}))
        return
    say(f"in: {', '.join(result.inputs)}; out: {', '.join(result.outputs)}")
    size = result.file.stat().st_size / 1e6
    say(f"wrote {result.file} ({size:.1f} MB); its logits differ from PyTorch's by at most {result.difference:.1e}")

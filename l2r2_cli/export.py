"""`l2r2 export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import say
from .options import Json, Run


def export(
    run: Run,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File to write: *.onnx, *.xml (OpenVINO), *.mlpackage (Core ML) or *.pt2 (torch.export)."
        ),
    ],
    takes: Annotated[
        str,
        typer.Option("--input", help="views, or image: one image and its boxes, cut inside the graph."),
    ] = "views",
    fp16: Annotated[bool, typer.Option("--fp16", help="Export the network in half precision.")] = False,
    as_json: Json = False,
) -> None:
    """Export a run for other runtimes and compare the file's outputs with PyTorch's."""
    from l2r2_models.checkpoints.export import export_run

    result = export_run(run, out, takes=takes, fp16=fp16)
    if as_json:
        typer.echo(json.dumps({**vars(result), "file": str(result.file)}))
        return
    say(f"in: {', '.join(result.inputs)}; out: {', '.join(result.outputs)}")
    compared = "not compared with PyTorch, because Core ML runs only on macOS"
    if result.difference is not None:
        compared = f"its logits differ from PyTorch's by at most {result.difference:.1e}"
    say(f"wrote {result.file} ({result.size / 1e6:.1f} MB); {compared}")

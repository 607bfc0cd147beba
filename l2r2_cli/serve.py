"""`l2r2 serve`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket
from typing import Annotated, Optional

import typer

from . import Interrupted
from .common import errors, say
from .options import (
    Abstain,
    BatchSize,
    Classes,
    Device,
    Geofence,
    Host,
    Localizer,
    MaxObjects,
    MaxPixels,
    Port,
    Region,
    Rollup,
    Run,
    Taxonomy,
    Top,
    box_threshold,
)


def serve(
    run: Run,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    localizer: Localizer = None,
    box_threshold: Annotated[Optional[float], box_threshold("the model's, usually 0.2")] = None,
    max_objects: MaxObjects = 10,
    top: Top = 3,
    classes: Classes = None,
    geofence: Geofence = None,
    region: Region = None,
    taxonomy: Taxonomy = None,
    rollup: Rollup = None,
    abstain: Abstain = None,
    batch_size: BatchSize = 32,
    wait: Annotated[
        float, typer.Option("--wait", min=0, max=10_000, help="Milliseconds that a batch waits for more images.")
    ] = 5,
    max_mb: Annotated[int, typer.Option(min=1, help="Megabytes per request.")] = 64,
    max_pixels: MaxPixels = 50_000_000,
    max_images: Annotated[int, typer.Option(min=1, help="Images per request.")] = 16,
    max_boxes: Annotated[int, typer.Option(min=1, help="Boxes per request.")] = 1000,
    max_queue: Annotated[int, typer.Option(min=1, help="Images that may wait, over all requests.")] = 64,
    device: Device = None,
) -> None:
    """Answer HTTP requests with predictions, batched across connections; Ctrl-C stops the server."""
    from l2r2_models.serve.server import check_installed, listen
    from l2r2_models.serve.server import serve as run_server

    check_installed("serve", "fastapi", "uvicorn", "python_multipart")
    from l2r2_models.predict.predictor import Predictor
    from l2r2_models.predict.rule_files import rules_for
    from l2r2_models.serve.api import create_app
    from l2r2_models.serve.limits import Limits

    limits = Limits(max_mb, max_pixels, max_images, max_boxes, max_queue)
    opened, url = listen(host, port)
    predictor = Predictor.from_pretrained(
        run,
        box_threshold=box_threshold,
        max_objects=max_objects,
        batch_size=batch_size,
        top=top,
        device=device,
        localizer=localizer,
    )
    names = dict(classes=classes, geofence=geofence, region=region, taxonomy=taxonomy, rollup=rollup)
    predictor = predictor.with_rules(rules_for(predictor.checkpoint, abstain=abstain, **names))
    warn_if_public(opened)
    say(f"serving {run} on {url} (Ctrl-C to stop)")
    with until_stopped():
        run_server(create_app(predictor, limits, wait / 1000), opened)


@contextmanager
def until_stopped() -> Iterator[None]:
    """Say that the server has stopped, because there is nothing to continue after Ctrl-C."""
    try:
        yield
    except Interrupted:
        raise Interrupted("stopped") from None


def warn_if_public(opened: socket) -> None:
    """Warn if other machines can reach the server."""
    if opened.getsockname()[0] not in ("127.0.0.1", "::1"):
        errors.print("there is no password; anyone who can reach this address can use the model")

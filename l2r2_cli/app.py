"""`l2r2 app`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Optional

import typer

from .common import say
from .options import (
    Boxes,
    Classes,
    Device,
    Geofence,
    Host,
    Localizer,
    MaxPixels,
    Method,
    Port,
    Prior,
    Region,
    Rollup,
    Run,
    Taxonomy,
    box_threshold,
)
from .serve import until_stopped, warn_if_public


def app(
    run: Run,
    backgrounds: Annotated[
        Optional[Path], typer.Option("--backgrounds", help="Folder of images to which the object can be moved; 24 are offered.")
    ] = None,
    audit: Annotated[Optional[Path], typer.Option("--audit", help="Labeled data set on which the page offers an audit.")] = None,
    boxes: Boxes = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    localizer: Localizer = None,
    box_threshold: Annotated[Optional[float], box_threshold("the model's, usually 0.2")] = None,
    method: Method = "auto",
    classes: Classes = None,
    geofence: Geofence = None,
    region: Region = None,
    taxonomy: Taxonomy = None,
    rollup: Rollup = None,
    prior: Prior = None,
    max_mb: Annotated[int, typer.Option(min=1, help="Megabytes per photo.")] = 20,
    max_pixels: MaxPixels = 50_000_000,
    device: Device = None,
) -> None:
    """Show a page in the browser: predictions for a photo and their reasons, and an audit; Ctrl-C stops it."""
    if boxes is not None and audit is None:
        raise typer.BadParameter("--boxes are those of the audited images; add --audit DATA")
    from l2r2_models.serve.server import check_installed, listen, serve

    check_installed("app", "gradio", "fastapi", "uvicorn", "captum", "sklearn", "jinja2", "matplotlib")
    from l2r2_models.app.audited import Folder
    from l2r2_models.app.page import create_app
    from l2r2_models.app.studio import Studio
    from l2r2_models.checkpoints import load_checkpoint
    from l2r2_models.explain.explainer import Explainer
    from l2r2_models.fusion.prior_file import read_prior
    from l2r2_models.predict.rule_files import rules_for

    opened, url = listen(host, port)
    checkpoint = load_checkpoint(run)
    if localizer is None:
        own = {"mask-head": checkpoint.model.mask_head, "head": checkpoint.model.box_head}
        localizer = next((name for name, head in own.items() if head is not None), None)
    explainer = Explainer(
        checkpoint, method=method, numbers=False, box_threshold=box_threshold, localizer=localizer, device=device
    )
    rules = rules_for(checkpoint, classes=classes, geofence=geofence, region=region, taxonomy=taxonomy, rollup=rollup)
    corrected = None if prior is None else read_prior(prior, checkpoint.labels)
    studio = Studio(explainer.with_rules(rules), backgrounds, max_pixels, corrected)
    audited = None if audit is None else Folder(run, audit, boxes)
    with TemporaryDirectory(prefix="l2r2-app-") as folder:
        page = create_app(studio, Path(folder), max_mb, audited)
        warn_if_public(opened)
        say(f"open {url} in a browser (Ctrl-C to stop)")
        with until_stopped():
            serve(page, opened, seconds=1)  # an open page holds its connection

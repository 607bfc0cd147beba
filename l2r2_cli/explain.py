"""`l2r2 explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .common import count, errors, say, track
from .options import (
    Boxes,
    Classes,
    Geofence,
    Json,
    Localizer,
    Metadata,
    Method,
    Prior,
    Region,
    Run,
    Seed,
    Split,
    box_threshold,
)


def explain(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, or a data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")],
    boxes: Boxes = None,
    localizer: Localizer = None,
    split: Split = None,
    method: Method = "auto",
    target: Annotated[
        Optional[list[str]],
        typer.Option(help="Class to explain. Repeatable: several count as one.", show_default="the predicted class"),
    ] = None,
    against: Annotated[
        Optional[str], typer.Option(help='Class to contrast with ("why A and not B"): a name, or runner-up.')
    ] = None,
    sort: Annotated[
        str, typer.Option(help="Order of the images: disagreement, outside (the object) or error, the largest first.")
    ] = "disagreement",
    limit: Annotated[Optional[int], typer.Option(min=1, help="Maximum number of images, evenly spaced.")] = None,
    shown: Annotated[int, typer.Option(min=1, help="Number of images shown on the page; the summary covers all.")] = 24,
    numbers: Annotated[
        bool, typer.Option(help="Compute insertion, deletion and counterfactuals, about 60 forward passes per image.")
    ] = True,
    box_threshold: Annotated[Optional[float], box_threshold("the model's")] = None,
    classes: Classes = None,
    geofence: Geofence = None,
    region: Region = None,
    prior: Prior = None,
    metadata: Metadata = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Explain predictions with saliency maps per branch and counterfactuals, as an HTML page; rerun to resume."""
    from l2r2_models.errors import L2R2Error
    from l2r2_models.explain.explainer import Explainer
    from l2r2_models.predict.inputs import gather
    from l2r2_models.predict.rule_files import rules_for, with_prior
    from l2r2_models.report.explain import SORTS
    from l2r2_models.report.explain_files import explain_to_page

    if localizer is not None and boxes is not None:
        raise typer.BadParameter("--localizer finds the boxes and --boxes reads them from a file; use one or the other")
    if metadata is not None and prior is None:
        raise typer.BadParameter("--metadata has the columns for --prior; pass both")
    if sort not in SORTS:
        raise L2R2Error(f'Unknown order "{sort}"; choose from {", ".join(SORTS)}.')
    inputs = gather(images, boxes, split)
    inputs = inputs if metadata is None else inputs.with_columns(metadata)
    inputs = (inputs.without_boxes() if localizer is not None else inputs).evenly(limit)
    if sort == "error" and (unknown := [path for path in inputs.paths if str(path) not in inputs.labels]):
        raise L2R2Error(f"{unknown[0]}: has no label, which --sort error needs; pass a data set with labels.")
    explainer = Explainer.from_pretrained(
        run,
        method=method,
        target=tuple(target or ()),
        against=against,
        numbers=numbers,
        box_threshold=box_threshold,
        localizer=localizer,
    )
    rules = rules_for(explainer.predictor.checkpoint, classes=classes, geofence=geofence, region=region)
    explainer = explainer.with_rules(rules if prior is None else with_prior(rules, prior, inputs))

    def show(found: dict[str, Any] | L2R2Error) -> None:
        if isinstance(found, L2R2Error):
            errors.print(f"failed: {found}")
        elif as_json:
            typer.echo(json.dumps(found))

    bar = lambda items, total: track(items, total, "explaining")  # noqa: E731
    report = explain_to_page(explainer, inputs, out, sort=sort, shown=shown, seed=seed, progress=bar, each=show)
    if report.kept:
        say(f"{count(report.kept, 'image')} from before the interruption", err=as_json)
    say(report.lead, err=as_json)
    say(f"wrote {out}", err=as_json)
    if report.failures:
        raise typer.Exit(1)

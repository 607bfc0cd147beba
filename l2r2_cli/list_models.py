"""`l2r2 list`."""

from __future__ import annotations

import fnmatch
import json
from typing import Annotated

import typer

from .common import say, show


def list_models(
    pattern: Annotated[str, typer.Argument(help="Only names that match, e.g. '*convnext*'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Every tag, and where its weights come from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the models: parameters, input size, default tag; with --pretrained every tag."""
    from rich.table import Table

    from l2r2_models.errors import L2R2Error
    from l2r2_models.models.hub_configs import load_hub_configs
    from l2r2_models.models.weights import whereabouts

    configs = [c for c in load_hub_configs() if pretrained or c.default]
    configs = [c for c in configs if fnmatch.fnmatch(c.name, pattern) or fnmatch.fnmatch(c.architecture, pattern)]
    if not configs:
        raise L2R2Error(f'No model matches "{pattern}"; `l2r2 list` shows all.')
    places = [("hub", False) if c.trained else whereabouts(c.source, c.hub_id) for c in configs]
    rows = [
        {
            "model": c.architecture,
            "tag": c.tag,
            "parameters": c.parameters,
            "input_size": c.input_size,
            "labels": c.labels,
            "source_top1": c.top1,
            "license": c.license,
            "hub_id": c.hub_id,
            "made_by": c.made_by,
            "metrics": c.metrics,
            "weights_from": place,
            "on_this_machine": here,
        }
        for c, (place, here) in zip(configs, places)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("model", "tag" if pretrained else "default tag", box=None, header_style="bold", pad_edge=False)
    for title in ("params (M)", "input", "source's top-1"):
        table.add_column(title, justify="right")
    table.add_column("license of the weights")
    table.add_column("weights from")
    for c, (place, here) in sorted(zip(configs, places), key=lambda row: (row[0].parameters, not row[0].default)):
        top1 = "" if c.top1 is None else f"{c.top1:.1f}"
        place += " (on this machine)" if here else ""
        size, parameters = str(c.input_size), f"{c.parameters / 1e6:.1f}"
        table.add_row(c.architecture, c.tag, parameters, size, top1, c.license or "see its page", place)
    show(table)
    say(f"{len(configs)} shown. top-1: ImageNet-1k figure of timm's weights that the heads start from, not of L2R2.")

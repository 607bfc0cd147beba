"""`l2r2 list`. It reads the table of the zoo without importing `l2r2_models`."""

from __future__ import annotations

import fnmatch
import json
import os
from typing import Annotated, Optional

import typer
from l2r2_hub_configs import FOLDER, HubConfig, derived_configs
from l2r2_hub_configs.packaged import whereabouts

from .common import Refusal, columns
from .options import Json


def list_models(
    pattern: Annotated[str, typer.Argument(help="Show only names that match, e.g. '*convnext*'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Show every pretrained tag, not only defaults.")] = False,
    license: Annotated[
        Optional[list[str]], typer.Option(help="Show only weights under this license, e.g. apache-2.0. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the models with parameters, input size, default tag, and where its weights come from."""
    configs = [c for c in _configs() if pretrained or c.default]
    configs = [c for c in configs if fnmatch.fnmatch(c.name, pattern) or fnmatch.fnmatch(c.architecture, pattern)]
    if not configs:
        raise Refusal(f"No model matches {pattern!r}; `l2r2 list` shows all.")
    if license:
        wanted, found = {name.lower() for name in license}, sorted({c.license for c in configs if c.license})
        configs = [c for c in configs if c.license in wanted]
        if not configs:
            raise Refusal(f"None of these models has the license {' or '.join(license)}; their licenses are: {', '.join(found)}.")
    places = [("hub", False) if c.trained else whereabouts(c.source, c.hub_id) for c in configs]
    if as_json:
        typer.echo(json.dumps([_as_dict(c, *place) for c, place in zip(configs, places)], indent=1))
        return
    rows = [("model", "tag" if pretrained else "default tag", "params (M)", "input", "source's top-1", "license", "weights from")]
    for c, (place, here) in sorted(zip(configs, places), key=lambda row: (row[0].parameters, not row[0].default)):
        top1 = "" if c.top1 is None else f"{c.top1:.1f}"
        place += " (on this machine)" if here else ""
        size, parameters = str(c.input_size), f"{c.parameters / 1e6:.1f}"
        rows.append((c.architecture, c.tag, parameters, size, top1, c.license or "see its page", place))
    for line in columns(rows, right=(2, 3, 4)):
        typer.echo(line)
    typer.echo(f"{len(configs)} shown. top-1: ImageNet-1k accuracy of the timm weights, not of the L2R2 model.")


def _configs() -> tuple[HubConfig, ...]:
    """Return the table, and the trained checkpoints that the environment variable lists."""
    if not os.environ.get(FOLDER):
        derived: tuple[HubConfig, ...] = derived_configs()
        return derived
    from l2r2_models.models.hub_configs import load_hub_configs  # validates the user's files

    return load_hub_configs()


def _as_dict(c: HubConfig, place: str, here: bool) -> dict[str, object]:
    return {
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

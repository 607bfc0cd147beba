"""Which public weights a checkpoint started from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timm.models import get_pretrained_cfg

from ..models.hub_configs import load_hub_configs


@dataclass(frozen=True)
class Source:
    """The public weights that a training started from; all None for one from scratch."""

    name: str | None = None
    hub_id: str | None = None
    license: str | None = None


def source_of_training(training: Mapping[str, Any]) -> Source:
    """Which public weights a checkpoint started from, by what its config says of its training: by the checkpoint that it was
    to start from, by its recipe, or by how it was derived."""
    if isinstance(started := training.get("init"), dict) and isinstance(found := started.get("source"), dict):
        return Source(**{f.name: found[f.name] for f in fields(Source) if isinstance(found.get(f.name), str)})
    recipe = training.get("recipe", {})
    name = recipe.get("model") if recipe.get("pretrained") else training.get("derived_from")
    if not isinstance(name, str):
        return Source()
    for config in load_hub_configs():
        if name == config.name or (name == config.architecture and config.default):
            return Source(config.source, config.hub_id, config.license)
    try:
        cfg = get_pretrained_cfg(name.removeprefix("timm:"))
    except RuntimeError:
        cfg = None
    return Source(name.removeprefix("timm:"), cfg.hf_hub_id if cfg else None, (cfg.license or None) if cfg else None)

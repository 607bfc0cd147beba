"""The public weights that a checkpoint was initialized from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timm.models import get_pretrained_cfg

from ..models.hub_configs import load_hub_configs


@dataclass(frozen=True)
class Source:
    """The public weights that a model was initialized from; all None if it was trained from scratch.

    Attributes:
        name: the timm model with its tag.
        hub_id: their repository on the Hub.
        license: their license.
    """

    name: str | None = None
    hub_id: str | None = None
    license: str | None = None


def source_of_training(training: Mapping[str, Any]) -> Source:
    """Find the public weights that a checkpoint was initialized from.

    Args:
        training: the training section of its config, whose initial checkpoint, recipe or derivation names them.

    >>> source_of_training({"recipe": {"model": "l2r2_resnet18", "pretrained": False}})
    Source(name=None, hub_id=None, license=None)
    """
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

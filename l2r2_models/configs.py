"""hub_configs/: one YAML a checkpoint, read with a strict schema. The zoo's pretrained tags are made from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import yaml

from .errors import L2R2Error


@dataclass(frozen=True)
class HubConfig:
    """One checkpoint of the zoo.

    Attributes:
        architecture: registered model, e.g. `l2r2_convnextv2_base`.
        tag: pretrained tag; `timm.create_model(f"{architecture}.{tag}", pretrained=True)` loads it.
        default: whether the bare architecture name means this tag.
        source: timm's model and tag whose weights start the backbone and, where it has a classifier, both heads.
        hub_id: Hub repository of the weights.
        licence: licence of those weights as timm records it; None where it records none.
        labels: name of the label set, None for weights without a classifier.
        parameters: number of parameters with the source's classes on both heads.
        input_size: side of the square input in pixels that the weights were trained at.
        top1: ImageNet-1k validation accuracy in % that timm reports for the source, None where it reports none.
        made_by: how the checkpoint comes about.
    """

    architecture: str
    tag: str
    default: bool
    source: str
    hub_id: str
    licence: str | None
    labels: str | None
    parameters: int
    input_size: int
    top1: float | None
    made_by: str

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}"


def parse_hub_config(data: Any, file: str) -> HubConfig:
    """Check one YAML's content against the schema.

    Raises:
        L2R2Error: a key is unknown, missing or of the wrong type; the message names the file.
    """
    if not isinstance(data, dict):
        raise L2R2Error(f"{file}: a hub config is a mapping of {', '.join(f.name for f in fields(HubConfig))}.")
    names = [f.name for f in fields(HubConfig)]
    if unknown := sorted(map(str, set(data) - set(names))):
        raise L2R2Error(f"{file}: unknown key {', '.join(unknown)}; choose from {', '.join(names)}.")
    if missing := [n for n in names if n not in data]:
        raise L2R2Error(f"{file}: missing key {', '.join(missing)}.")
    for field in fields(HubConfig):
        kinds = {"str": str, "bool": bool, "int": int, "float": (int, float)}
        kind, _, optional = str(field.type).partition(" | ")
        value = data[field.name]
        fits = isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "bool")  # type: ignore[arg-type]
        if not fits and not (value is None and optional):
            raise L2R2Error(f"{file}: {field.name} must be {field.type}, got {value!r}.")
    return HubConfig(**data)


@functools.lru_cache(maxsize=1)
def load_hub_configs() -> tuple[HubConfig, ...]:
    """All hub configs that came with the package, sorted by name."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    folder = resources.files("l2r2_models.hub_configs")
    configs = [
        parse_hub_config(yaml.load(entry.read_text(encoding="utf-8"), loader), entry.name)
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    ]
    return tuple(sorted(configs, key=lambda c: c.name))

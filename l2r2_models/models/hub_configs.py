"""hub_configs/: one YAML a checkpoint, read with a strict schema. The zoo's pretrained tags are made from them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import L2R2Error
from ..io import parse_yaml, read_text

FOLDER = "L2R2_HUB_CONFIGS"  # environment variable: a folder with more of them, e.g. an organization's own
METRIC = {"dataset": str, "split": str, "output": str, "metric": str, "value": (int, float)}
LOCALIZER = ("spec", "prompt", "license")


@dataclass(frozen=True)
class HubConfig:
    """One checkpoint of the zoo.

    Attributes:
        architecture: registered model, e.g. `l2r2_convnextv2_base`.
        tag: pretrained tag; `timm.create_model(f"{architecture}.{tag}", pretrained=True)` loads it.
        default: whether the bare architecture name means this tag.
        source: timm's model and tag whose weights start the backbone and, where it has a classifier, both heads.
        hub_id: Hub repository of the weights.
        license: license of those weights as timm records it; None where it records none.
        labels: name of the label set, None for weights without a classifier.
        parameters: number of parameters with the source's classes on both heads.
        input_size: side of the square input in pixels that the weights were trained at.
        top1: ImageNet-1k validation accuracy in % that timm reports for the source, None where it reports none.
        made_by: how the checkpoint comes about; of a trained one the command.
        label_names: of a trained checkpoint: one name a class.
        model_args: of a trained checkpoint: its branches, fusion, views and whatever else builds the model.
        localizer: the localizer that it is meant for: spec, prompt, license.
        metrics: what was measured: dataset, split, output (full, fg, fused), metric, value.
    """

    architecture: str
    tag: str
    default: bool
    source: str
    hub_id: str
    license: str | None
    labels: str | None
    parameters: int
    input_size: int
    top1: float | None
    made_by: str
    label_names: list[str] | None = None
    model_args: dict[str, Any] | None = None
    localizer: dict[str, str] | None = None
    metrics: list[dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}"

    def to_yaml(self) -> str:
        """The file's content; keys that only trained checkpoints have are left out where they are empty."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.default is MISSING or getattr(self, f.name) is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)

    @property
    def trained(self) -> bool:
        """Whether the weights are an L2R2 checkpoint, and not timm's that one is derived from."""
        return self.model_args is not None


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
    if missing := [f.name for f in fields(HubConfig) if f.default is MISSING and f.name not in data]:
        raise L2R2Error(f"{file}: missing key {', '.join(missing)}.")
    for field in fields(HubConfig):
        if field.name not in data:
            continue
        kinds = {"str": str, "bool": bool, "int": int, "float": (int, float), "list": list, "dict": dict}
        kind, _, optional = str(field.type).partition(" | ")
        kind, value = kind.partition("[")[0], data[field.name]
        fits = isinstance(value, kinds[kind]) and isinstance(value, bool) == (kind == "bool")  # type: ignore[arg-type]
        if not fits and not (value is None and optional):
            raise L2R2Error(f"{file}: {field.name} must be {field.type}, got {value!r}.")
    config = HubConfig(**data)
    _check_trained(config, file)
    return config


def _check_trained(config: HubConfig, file: str) -> None:
    names = config.label_names
    if (names is None) != (config.model_args is None):
        raise L2R2Error(f"{file}: label_names and model_args belong together, for a trained checkpoint.")
    if names is not None and not (names and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)):
        raise L2R2Error(f"{file}: label_names must be different names.")
    if config.trained and config.default:
        raise L2R2Error(f"{file}: a trained checkpoint cannot be the default of its architecture.")
    if config.localizer is not None and not all(k in LOCALIZER and isinstance(v, str) for k, v in config.localizer.items()):
        raise L2R2Error(f"{file}: localizer takes {', '.join(LOCALIZER)}, each a text.")
    for metric in config.metrics or ():
        fits = isinstance(metric, dict) and set(metric) == set(METRIC)
        if not fits or not all(isinstance(metric[k], kind) for k, kind in METRIC.items()):  # type: ignore[arg-type]
            raise L2R2Error(f"{file}: each of the metrics needs {', '.join(METRIC)}.")


@functools.lru_cache(maxsize=1)
def load_hub_configs() -> tuple[HubConfig, ...]:
    """All hub configs that came with the package, and those in the folder that `L2R2_HUB_CONFIGS` names, sorted by name.

    Raises:
        L2R2Error: a file does not fit the schema, two say the same name, or the folder does not exist.
    """
    configs: dict[str, HubConfig] = {}
    for name, data in _files():
        config = parse_hub_config(data, name)
        if config.name in configs:
            raise L2R2Error(f"{name}: there is another hub config of {config.name}.")
        configs[config.name] = config
    return tuple(configs[name] for name in sorted(configs))


def _files() -> Iterator[tuple[str, Any]]:
    """Name and content of every hub config."""
    fast = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # our own files are read with every import of the package
    for entry in resources.files("l2r2_models.hub_configs").iterdir():
        if entry.name.endswith(".yaml"):
            yield entry.name, yaml.load(entry.read_text(encoding="utf-8"), fast)
    if folder := os.environ.get(FOLDER):
        if not Path(folder).is_dir():
            raise L2R2Error(f"{folder}: no such folder; {FOLDER} names it.")
        for file in sorted(Path(folder).glob("*.yaml")):
            yield str(file), parse_yaml(read_text(file), str(file))

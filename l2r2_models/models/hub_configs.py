"""The zoo's pretrained tags: the derived ones of `hub_configs/derived.csv`, and trained checkpoints, one YAML file each."""

from __future__ import annotations

import functools
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from l2r2_hub_configs import FOLDER, HubConfig, derived_configs

from ..errors import L2R2Error
from ..io import parse_yaml, read_text

METRIC = {"dataset": str, "split": str, "output": str, "metric": str, "value": (int, float)}
LOCALIZER = ("spec", "prompt", "license")


def parse_hub_config(data: Any, file: str) -> HubConfig:
    """Check one YAML's content against the schema.

    Raises:
        L2R2Error: when a key is unknown, missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise L2R2Error(f"{file}: not a hub config; it must be a mapping of {', '.join(f.name for f in fields(HubConfig))}.")
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
        raise L2R2Error(f"{file}: label_names and model_args must be given together, for a trained checkpoint.")
    if names is not None and not (names and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)):
        raise L2R2Error(f"{file}: label_names must be distinct.")
    if config.trained and config.default:
        raise L2R2Error(f"{file}: a trained checkpoint cannot be the default of its architecture.")
    if config.localizer is not None and not all(k in LOCALIZER and isinstance(v, str) for k, v in config.localizer.items()):
        raise L2R2Error(f"{file}: the keys of localizer are {', '.join(LOCALIZER)}, each with a text value.")
    for metric in config.metrics or ():
        fits = isinstance(metric, dict) and set(metric) == set(METRIC)
        if not fits or not all(isinstance(metric[k], kind) for k, kind in METRIC.items()):  # type: ignore[arg-type]
            raise L2R2Error(f"{file}: each of the metrics needs {', '.join(METRIC)}.")


@functools.lru_cache(maxsize=1)
def load_hub_configs() -> tuple[HubConfig, ...]:
    """Return the derived tags, and the trained checkpoints in the folder `L2R2_HUB_CONFIGS`, sorted by name.

    Raises:
        L2R2Error: when a file does not match the schema, two have the same name, or the folder does not exist.
    """
    configs = {config.name: config for config in derived_configs()}
    for file in _files():
        config = parse_hub_config(parse_yaml(read_text(file), str(file)), str(file))
        if config.name in configs:
            raise L2R2Error(f"{file}: there is already a hub config of {config.name}; remove one.")
        configs[config.name] = config
    return tuple(configs[name] for name in sorted(configs))


def _files() -> list[Path]:
    """Return the YAML files of trained checkpoints."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return []
    if not Path(folder).is_dir():
        raise L2R2Error(f"{folder}: no such folder; set {FOLDER} to an existing one.")
    return sorted(Path(folder).glob("*.yaml"))

"""The pretrained tags of the zoo, which can be read without importing torch or timm.

`derived.csv` has one row per tag that is derived from timm's weights. Each trained checkpoint has its own YAML file in the
folder that the environment variable `L2R2_HUB_CONFIGS` points to, see `l2r2_models.models.hub_configs`.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

FOLDER = "L2R2_HUB_CONFIGS"  # environment variable with the folder of the YAML files, e.g. an organization's own
TABLE = Path(__file__).with_name("derived.csv")
MASKED, PARTS = "l2r2_masked_", "ifam_"  # fg drops tokens of a ViT by a mask; finds the object's parts itself
GENERIC = "l2r2"  # the model on any timm backbone

DERIVED = "derived: the backbone and both heads start from the source's weights; no training"
HEADLESS = "derived: the backbone starts from the source's weights, which have no classifier; heads are random"
UNTRAINED_PARTS = "derived: the backbone and stage 2's head start from the source's weights; parts and stage 1's head are random"


@dataclass(frozen=True)
class HubConfig:
    """One checkpoint of the zoo.

    Attributes:
        architecture: registered model, e.g. `l2r2_convnextv2_base`.
        tag: pretrained tag; `timm.create_model(f"{architecture}.{tag}", pretrained=True)` loads it.
        default: whether this is the default tag of the architecture.
        source: timm model and tag whose weights initialize the backbone and, if it has a classifier, both heads.
        hub_id: Hub repository of the weights.
        license: license of those weights according to timm; None if unknown.
        labels: name of the label set; None for weights without a classifier.
        parameters: number of parameters with the source's classes on both heads.
        input_size: side in pixels of the square images that the weights were trained on.
        top1: ImageNet-1k validation accuracy in % that timm reports for the source; None if it reports none.
        made_by: how the checkpoint was made; for a trained one, the command.
        label_names: for a trained checkpoint, one name per class.
        model_args: for a trained checkpoint, its branches, fusion, views and other arguments of the model.
        localizer: the localizer that it is meant for: spec, prompt, license.
        metrics: evaluation results: dataset, split, output (full, fg, fused), metric, value.
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
        """What `timm.create_model` takes: architecture and tag."""
        return f"{self.architecture}.{self.tag}"

    @property
    def trained(self) -> bool:
        """Whether the weights are a trained L2R2 checkpoint, and not timm's."""
        return self.model_args is not None

    def to_yaml(self) -> str:
        """Return the YAML of a trained checkpoint; optional keys without a value are left out."""
        import yaml

        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.default is MISSING or getattr(self, f.name) is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


@functools.cache
def derived_configs() -> tuple[HubConfig, ...]:
    """Return the tags that are derived from timm's weights, sorted by name.

    >>> [config.tag for config in derived_configs() if config.architecture == "l2r2_efficientnet_b0" and config.default]
    ['ra4_e3600_r224_in1k']
    """
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(sorted(map(_derived, csv.DictReader(file)), key=lambda config: config.name))


def _derived(row: dict[str, str]) -> HubConfig:
    """Complete one row of the table; values that follow from its columns are not stored in it."""
    source, labels = row["source"], row["labels"] or None
    by = (UNTRAINED_PARTS if row["architecture"].startswith(PARTS) else DERIVED) if labels else HEADLESS
    return HubConfig(
        architecture=row["architecture"],
        tag=source.partition(".")[2],
        default=row["default"] == "yes",
        source=source,
        hub_id=f"timm/{source}",
        license=row["license"] or None,
        labels=labels,
        parameters=int(row["parameters"]),
        input_size=int(row["input_size"]),
        top1=float(row["top1"]) if row["top1"] else None,
        made_by=by,
    )


def unknown_model(name: str) -> str | None:
    """Return the error message for an unknown model name; None for a known one, whatever its tag.

    Args:
        name: model name, with or without a tag, `timm:NAME`, or `vlm:MODEL?names=FILE`.

    >>> print(unknown_model("l2r2_resnet8"))
    Unknown model "l2r2_resnet8"; close names: l2r2_resnet18, l2r2_resnet50. `l2r2 list` shows all; timm:NAME takes any backbone.
    """
    architecture = name.partition(".")[0]
    known = {GENERIC, *(config.architecture for config in derived_configs())}
    if name.startswith(("timm:", "vlm:")) or architecture in known:
        return None
    close = get_close_matches(architecture, sorted(known), 3)
    hint = f"; close names: {', '.join(close)}. `l2r2 list` shows all" if close else "; `l2r2 list` shows the models"
    shown = repr(name)[1:-1]  # without control characters
    return f'Unknown model "{shown}"{hint}; timm:NAME takes any backbone.'

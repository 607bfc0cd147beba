"""Writes the YAMLs of the derived checkpoints: one for each weight of timm that an architecture of the zoo can start from.

    python hub_configs/generate.py results-imagenet.csv

The CSV is timm's own table (results/results-imagenet.csv of its repository); only its top-1 figures are taken. The default
tag of an architecture is the one with the highest top-1 among those trained on ImageNet-1k labels at up to 256 pixels: the
384- and 512-pixel weights are a few tenths better at three to five times the cost, and are one tag away. DINOv2 has one tag.
"""

from __future__ import annotations

import csv
import functools
import sys
from pathlib import Path

import timm
import torch
import yaml

from l2r2_models.models.registry import ARCHITECTURES, PARTS, timm_cfgs

DERIVED = "derived: the backbone and both heads start from the source's weights; no training"
HEADLESS = "derived: the backbone starts from the source's weights, which have no classifier; heads are random"
UNTRAINED_PARTS = "derived: the backbone and stage 2's head start from the source's weights; parts and stage 1's head are random"

LABELS = {0: None, 1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k"}


def read_top1(path: str) -> dict[str, float]:
    """Best reported top-1 over the tested image sizes, by timm name with tag."""
    best: dict[str, float] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            best[row["model"]] = max(best.get(row["model"], 0.0), float(row["top1"]))
    return best


@functools.lru_cache
def count_parameters(architecture: str, num_classes: int) -> int:
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=num_classes)
    return sum(p.numel() for p in model.parameters())


def configs_of(architecture: str, backbone: str, top1: dict[str, float]) -> list[dict]:
    configs = []
    for source, cfg in timm_cfgs(backbone).items():
        configs.append(
            {
                "architecture": architecture,
                "tag": source.split(".", 1)[1],
                "default": False,
                "source": source,
                "hub_id": cfg.hf_hub_id,
                "license": cfg.license,
                "labels": LABELS.get(cfg.num_classes, f"{cfg.num_classes} classes"),
                "parameters": count_parameters(architecture, cfg.num_classes),
                "input_size": cfg.input_size[-1],
                "top1": top1.get(source),
                "made_by": (UNTRAINED_PARTS if architecture.startswith(PARTS) else DERIVED) if cfg.num_classes else HEADLESS,
            }
        )
    in1k = [c for c in configs if c["labels"] == "imagenet-1k"] or configs
    affordable = [c for c in in1k if c["input_size"] <= 256] or in1k
    max(affordable, key=lambda c: c["top1"] or 0.0)["default"] = True
    return configs


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    top1 = read_top1(sys.argv[1])
    folder = Path(__file__).parent
    for old in folder.glob("*.yaml"):
        if yaml.safe_load(old.read_text())["made_by"].startswith("derived"):
            old.unlink()
    count = 0
    for architecture, backbone in ARCHITECTURES.items():
        for config in configs_of(architecture, backbone, top1):
            path = folder / f"{architecture}.{config['tag']}.yaml"
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            count += 1
    print(f"wrote {count} hub configs to {folder}")


if __name__ == "__main__":
    main()

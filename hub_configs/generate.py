"""Write derived.csv: one row for each of timm's weights that an architecture of the zoo can start from.

    python hub_configs/generate.py results-imagenet.csv

The CSV is timm's results/results-imagenet.csv; only the top-1 accuracies are used. The default
tag of an architecture is the one with the highest top-1 among those trained on ImageNet-1k labels at up to 256 pixels: the
384- and 512-pixel weights are a few tenths of a point better at three to five times the cost, and have their own tags. Without
a classifier on these labels, timm's own default is taken.
"""

from __future__ import annotations

import csv
import functools
import re
import sys
from typing import Any

import timm
import torch
from l2r2_hub_configs import TABLE

from l2r2_models.models.registry import ARCHITECTURES, timm_cfgs

LABELS = {0: None, 1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k"}
# image towers whose last layer projects into the space of the texts, which timm counts as classes
PROJECTED = re.compile(r"\.clip_(?!.*_ft_)|^vit_pe_core_")


def read_top1(path: str) -> dict[str, float]:
    """Best reported top-1 over the tested image sizes, by timm name with tag."""
    best: dict[str, float] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            best[row["model"]] = max(best.get(row["model"], 0.0), float(row["top1"]))
    return best


@functools.lru_cache
def count_parameters(architecture: str, num_classes: int) -> int:
    """Number of parameters of an architecture with this many classes."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=num_classes)
    return sum(p.numel() for p in model.parameters())


def rows_of(architecture: str, backbone: str, top1: dict[str, float]) -> list[dict[str, Any]]:
    """Return the rows of one architecture."""
    rows: list[dict[str, Any]] = []
    for source, cfg in timm_cfgs(backbone).items():
        if cfg.hf_hub_id != f"timm/{source}":
            sys.exit(f"{source}: its weights are at {cfg.hf_hub_id}; add a column for that to the table.")
        classes = 0 if PROJECTED.search(source) else cfg.num_classes
        rows.append(
            {
                "architecture": architecture,
                "source": source,
                "default": "",
                "labels": LABELS.get(classes, f"{classes} classes"),
                "input_size": cfg.input_size[-1],
                "parameters": count_parameters(architecture, classes),
                "top1": top1.get(source),
                "license": cfg.license,
            }
        )
    in1k = [row for row in rows if row["labels"] == "imagenet-1k"] or rows
    affordable = [row for row in in1k if row["input_size"] <= 256] or in1k
    max(affordable, key=lambda row: row["top1"] or 0.0)["default"] = "yes"
    return rows


def main() -> None:
    """Write the table."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    top1 = read_top1(sys.argv[1])
    rows = [row for architecture, backbone in ARCHITECTURES.items() for row in rows_of(architecture, backbone, top1)]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["architecture"], row["source"])))
    print(f"wrote {len(rows)} tags to {TABLE}")


if __name__ == "__main__":
    main()

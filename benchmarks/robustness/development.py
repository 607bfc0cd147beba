"""Compare settings of a recipe on development rows of fod_a_shift, which no training set of the seed and no table uses.

    python benchmarks/robustness/development.py DATA [--recipe finetune] [--set frozen_stride=16 --set lr=1e-3] [--seed 10]

Development rows are every third row of `train_minority` that is not among the 38 drawn for training: other weather and light, the
same objects. Everything else is as for the pretrained networks of background_shift.py. Prints the accuracy in % of each branch
and of the average of their logits, on validation and on development rows. The same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from background_shift import EPOCHS, PIXELS, SIDE, fod_rows, read_rows, recipe_of, write_rows

from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.evaluate.metrics import accuracy
from l2r2_models.io import parse_settings
from l2r2_models.train.finetune import finetune

STEP = 3  # neighboring rows are neighboring video frames


def development_rows(data: Path, seed: int) -> list[dict]:
    """Select the training and validation rows of a seed, and the development rows as the split `dev`."""
    chosen = [row for row in fod_rows(data, seed) if row["split"] in ("train", "val")]
    used = {row["file_name"] for row in chosen}
    left = [row for row in read_rows(data) if row["split"] == "train_minority" and row["file_name"] not in used]
    return chosen + [{**row, "split": "dev"} for row in left[::STEP]]


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="finetune")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("runs/development"))
    options = parser.parse_args()
    name = "_".join([options.recipe, *sorted(options.set), f"s{options.seed}"]).replace("/", "-")
    rows = development_rows(options.data, options.seed)
    file = write_rows(rows, "", options.work / f"rows_s{options.seed}.csv", SIDE["fod_a_shift"])
    case = {"size": PIXELS["pretrained"]["fod_a_shift"], "epochs": EPOCHS["pretrained"]["fod_a_shift"], "seed": options.seed}
    recipe = recipe_of("pretrained", options.recipe, **{**case, **parse_settings(options.set)})
    finetune(options.data, recipe, options.work / name, metadata=file, val_split="val")
    checkpoint, table = load_checkpoint(options.work / name), read_table(options.data, metadata=file)
    for split in ("val", "dev"):
        found = branch_logits(checkpoint, table.of_split(split), options.work / name / "logits")
        outputs = {**found.logits, "average": sum(found.logits.values()) / len(found.logits)}
        reached = (f"{branch} {100 * accuracy(z.argmax(-1), found.labels):.1f}" for branch, z in outputs.items())
        print(f"{name}, {split} ({len(found)} rows): {', '.join(reached)}")


if __name__ == "__main__":
    main()

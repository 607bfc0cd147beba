"""Plain classifier and L2R2 on the natural background shift of FOD-A, through the same finetune and predict that users call.

    python benchmarks/robustness/fod_a_shift.py DATA [--seeds 0 1 2] [--work runs/fod_a_shift]

DATA is an imagefolder whose metadata.csv has the splits train (background tied to class), train_minority (other
backgrounds), test_id and test_ood. Training takes `train` and 38 rows of `train_minority`, drawn with the run's seed: 95 %
correlation. Nothing is chosen on any of it: default recipe from scratch, weights after the last epoch, default fusion.
Interrupted, the same command continues. Writes benchmarks/results/fod_a_shift.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import random
from importlib.metadata import version
from pathlib import Path

import torch

from l2r2_models.data.table import read_table
from l2r2_models.predictions import accuracy_by_branch, gather, predict_to_file
from l2r2_models.predictor import Predictor
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipes import Recipe

MINORITY = 38
SPLITS = ("test_id", "test_ood")
MODELS = {"plain": {"branches": ("full",)}, "l2r2 shared": {}}
RESULTS = Path(__file__).parent.parent / "results" / "fod_a_shift.csv"


def write_rows(data: Path, out: Path, seed: int) -> Path:
    """The training rows of a seed, as a metadata file of their own."""
    with open(data / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    minority = [row for row in rows if row["split"] == "train_minority"]
    chosen = [row for row in rows if row["split"] == "train"] + random.Random(seed).sample(minority, MINORITY)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "split": "train"} for row in chosen)
    return out


def measure(data: Path, work: Path, name: str, seed: int, size: int, epochs: int) -> list[dict]:
    run = work / f"{name.replace(' ', '_')}_s{seed}"
    rows = write_rows(data, work / f"rows_s{seed}.csv", seed)
    recipe = Recipe.default("l2r2_resnet18", False, size=size, epochs=epochs, seed=seed, **MODELS[name])
    print(f"{name}, seed {seed}", flush=True)
    finetune(data, recipe, run, metadata=rows)
    truth = {str(row.path): str(row.label) for row in read_table(data).rows}
    predictor = Predictor.from_pretrained(run)
    found = {}
    for split in SPLITS:
        report = predict_to_file(predictor, gather([data], split=split), work / f"{run.name}_{split}.json")
        found[split] = accuracy_by_branch(report.images, truth)
    branches = [b for b in found[SPLITS[0]] if name != "plain" or b == "fused"]
    return [
        {"model": name, "answer": "" if name == "plain" else b, "seed": seed}
        | {split: round(100 * found[split][b], 1) for split in SPLITS}
        for b in branches
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/fod_a_shift"))
    arguments = parser.parse_args()
    about = {
        "backbone": "resnet18 from scratch", "pixels": arguments.size, "epochs": arguments.epochs,
        "training_rows": 720 + MINORITY,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "torch": version("torch"),
        "timm": version("timm"), "transformers": version("transformers"), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    table: list[dict] = []
    for seed in arguments.seeds:
        for name in MODELS:
            table += measure(arguments.data, arguments.work, name, seed, arguments.size, arguments.epochs)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with open(RESULTS, "w", newline="") as file:
                writer = csv.DictWriter(file, [*table[0], *about])
                writer.writeheader()
                writer.writerows({**row, **about} for row in table)
    for row in table:
        figures = "   ".join(f"{split} {row[split]:5.1f}" for split in SPLITS)
        print(f"{row['model']:12} {row['answer']:6} seed {row['seed']}   {figures}")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()

"""Evaluate localizers: their boxes, the predictions with these boxes, and how much of the gain of fg remains.

    python benchmarks/robustness/localizers.py fod_a_shift DATA            [--seeds 0 1 2]
    python benchmarks/robustness/localizers.py composites  OBJECTS SCENES  [--seeds 0 1 2]

Data, rows, recipe and seeds are those of background_shift.py. One network per seed is trained with `--box-head` on the given
boxes of the training rows, and evaluated on the test images with the boxes of each localizer:

    given   the boxes of the data set, as from a perfect detector
    head    the box head, trained on the boxes of the training rows only
    outlier what differs most from the image's border, on features of EfficientNet-Lite0 as ImageNet left them
    ncut    a normalized cut of the same network's features; cam: the class activation map of its full branch
    center  the middle half of the image; full: the whole image

A second network per seed is trained, and evaluated, with the boxes of `outlier` alone: no box is given at all (`trained_on`).

`robust` has its default threshold; nothing is fitted. `gain` is the share of the gain of fg over full on test_ood that remains:
(fg - full) / (fg with given boxes - full), with full and given boxes of the first network. The same command continues an
interrupted benchmark. Writes benchmarks/results/localizers_NAME_START.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from background_shift import (
    EPOCHS,
    NETWORKS,
    PIXELS,
    PRECISIONS,
    RECIPES,
    RESULTS,
    SIDE,
    SPLITS,
    about_run,
    data_of,
    recipe_of,
    write_rows,
    write_table,
)

from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.table import ImageTable, read_table
from l2r2_models.evaluate.fuse import fuse
from l2r2_models.evaluate.localization import evaluate_boxes
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.evaluate.metrics import accuracy
from l2r2_models.localize import create_localizer
from l2r2_models.localize.localize_files import localize_to_file
from l2r2_models.train.finetune import finetune

LOCALIZERS = {
    "head": "head:{run}",
    "outlier": "outlier",
    "ncut": "ncut:{run}?size={size}",
    "cam": "cam:{run}",
    "center": "center",
    "full": "full",
}
METRICS = ("corloc", "mean_iou", "full", "fg", "robust", "gain")


def boxes_by(name: str, table: ImageTable, splits: Sequence[str], run: Path, size: int) -> Path:
    """Find boxes in the images of some splits; the boxes of `outlier` do not depend on the run, and are shared by all runs."""
    file = (run.parent if name == "outlier" else run) / f"boxes_{name}.json"
    paths = [row.path for split in splits for row in table.of_split(split).rows]
    localize_to_file(create_localizer(LOCALIZERS[name].format(run=run, size=2 * size)), paths, file, batch_size=32)
    return file


def measure(data: Path, rows: Path, run: Path, name: str, size: int) -> dict:
    """Measure IoU and CorLoc of a localizer's boxes on each test split, and the accuracy of full, fg and robust with them."""
    checkpoint, table, row = load_checkpoint(run), read_table(data, metadata=rows), {}
    if name != "given":
        file = boxes_by(name, table, SPLITS, run, size)
        table = read_table(data, metadata=rows, boxes=file)
    for split in SPLITS:
        if name != "given":
            judged = evaluate_boxes(file, data, split=split, metadata=rows)
            row[f"{split}_corloc"], row[f"{split}_mean_iou"] = round(100 * judged.corloc, 1), round(100 * judged.mean_iou, 1)
            row[f"{split}_object_inside"], row[f"{split}_missed"] = round(100 * judged.area_recall, 1), judged.missed
        found = branch_logits(checkpoint, table.of_split(split), run / "logits")
        fg = found.logits["fg"].where(found.has_fg[:, None], found.logits["full"])
        robust = fuse(checkpoint.model.fusion, found)
        for answer, logits in (("full", found.logits["full"]), ("fg", fg), ("robust", robust)):
            row[f"{split}_{answer}"] = round(100 * accuracy(logits.argmax(-1), found.labels), 1)
    return row


def add_gains(table: list[dict]) -> None:
    """Add the gain on test_ood; on test_id, fg and full are too close for a ratio of differences."""
    for row in table:
        given = next(r for r in table if r["localizer"] == "given" and r["seed"] == row["seed"])
        possible = given["test_ood_fg"] - given["test_ood_full"]
        row["test_ood_gain"] = round(100 * (row["test_ood_fg"] - given["test_ood_full"]) / possible, 1) if possible > 0 else ""


def print_means(table: list[dict]) -> None:
    """Print the mean over the seeds."""
    by_name: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in table:
        by_name[row["localizer"], row["trained_on"]].append(row)
    for (name, trained_on), rows in by_name.items():
        for split in SPLITS:
            known = [k for k in METRICS if rows[0].get(f"{split}_{k}") not in ("", None)]
            cells = "  ".join(f"{k} {statistics.mean(row[f'{split}_{k}'] for row in rows):5.1f}" for k in known)
            print(f"{name:7} (trained on {trained_on:7}) {split:9} {cells}   {len(rows)} seeds")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SIDE))
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--start", choices=list(NETWORKS), default="pretrained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="fewer for a quick try; default as in background_shift.py")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="the table; default benchmarks/results/localizers_NAME_START.csv")
    options = parser.parse_args()
    size, epochs = PIXELS[options.start][options.name], options.epochs or EPOCHS[options.start][options.name]
    name = f"{options.name}_{options.start}"
    work, out = options.work / name, options.out or RESULTS / f"localizers_{name}.csv"
    about = about_run(
        backbone=NETWORKS[options.start],
        start=options.start,
        recipe=RECIPES[options.start],
        pixels=size,
        epochs=epochs,
        precision=PRECISIONS[options.start],
    )
    table: list[dict] = []
    for seed in options.seeds:
        data, rows = data_of(options, seed, work)
        file = write_rows(rows, "", work / f"rows_given_s{seed}.csv", SIDE[options.name])
        recipe = recipe_of(options.start, seed=seed, size=size, epochs=epochs)
        print(f"seed {seed}", flush=True)
        run = work / f"box_head_s{seed}"
        finetune(data, replace(recipe, box_head=True), run, metadata=file, val_split="val")
        for name in ("given", *LOCALIZERS):
            table.append({"localizer": name, "trained_on": "given", "seed": seed, **measure(data, file, run, name, size)})
        run = work / f"outlier_s{seed}"
        boxes = boxes_by("outlier", read_table(data, metadata=file), ("train", "val"), run, size)
        finetune(data, recipe, run, metadata=file, boxes=boxes, val_split="val")
        table.append({"localizer": "outlier", "trained_on": "outlier", "seed": seed, **measure(data, file, run, "outlier", size)})
        add_gains(table)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, out, about)
    print_means(table)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""The paper's comparison of full, fg and their fusions (`docs/method.md`, section 10) on published data sets.

    l2r2 import waterbirds ARCHIVE --with CUB_200_2011 -o data/waterbirds
    python benchmarks/robustness/published.py data/waterbirds data/cub ... [--seeds 0 1 2] [--models independent shared]

Each argument is a folder that `l2r2 import` wrote; missing sets are listed at the end. A set without boxes or masks needs
`boxes.json` in its folder (`l2r2 localize data/NAME --prompt dog -o data/NAME/boxes.json`).

`independent` is the paper's pair of networks, `shared` one backbone for both branches. If a set has no validation split, 15 % of
its training rows are held out, drawn with the run's seed. `fitted_on` is the kind of held-out rows on which the fusion is fitted
and chosen: unchanged (`plain`, as in the paper), or also with the backgrounds of other training images (`both`). Nothing is
fitted on test rows. An image without an object gets the prediction of full. `worst_group` is the lowest accuracy of a class on a
background. The same command continues an interrupted benchmark. Writes benchmarks/results/published_START.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from background_shift import NETWORKS, PRECISIONS, RESULTS, about_run, read_rows, recipe_of, write_rows, write_table
from torch import Tensor

from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.published import ABOUT, SETS
from l2r2_models.data.splits import hold_out
from l2r2_models.data.table import ImageTable, read_table
from l2r2_models.errors import L2R2Error
from l2r2_models.evaluate.backgrounds import logits_to_fit
from l2r2_models.evaluate.choose import choose, lead_alone, references
from l2r2_models.evaluate.fuse import affordable, fit, fuse
from l2r2_models.evaluate.logits import BranchLogits, branch_logits
from l2r2_models.evaluate.metrics import accuracy, by_group, macro_accuracy, oracle
from l2r2_models.fusion import create_fusion
from l2r2_models.io import read_json
from l2r2_models.train.finetune import finetune

RECIPES = {"pretrained": "finetune", "scratch": "scratch"}
HELD_OUT, FRACTION = "held_out", 0.15
MODELS = {"independent": {"shared": False}, "shared": {}}
FITTED_ON = ("plain", "both")


@dataclass(frozen=True)
class Setup:
    """The test splits, the validation split (None: rows held out of train), and the column of the background."""

    tests: tuple[str, ...] = ("test",)
    val: str | None = None
    background: str | None = "background"


SETUPS = {
    "waterbirds": Setup(val="val"),
    "in9": Setup(("test_original", "test_mixed_same", "test_mixed_rand"), "val", None),
    **{name: Setup() for name in SETS if name.startswith("spawrious")},
    "metashift": Setup(),
    "urbancars": Setup(val="val"),
    "hard-imagenet": Setup(("val",), None, None),
    "cub": Setup(background=None),
    "iwildcam": Setup(("id_test", "test"), "val", None),
}
ELSEWHERE = {
    "counteranimal": "is for testing only: evaluate an ImageNet classifier on it with `l2r2 audit timm:NAME`",
    "fod-a": "is covered by background_shift.py",
    "eth80": "provides the objects of the composites in background_shift.py",
}


def name_of(folder: Path) -> str:
    """Return the name of the data set in a folder.

    Raises:
        L2R2Error: when the folder was not written by `l2r2 import`, or the set is not in this benchmark.
    """
    if not (folder / ABOUT).is_file():
        raise L2R2Error("not an imported data set; make one with `l2r2 import`.")
    name = str(read_json(folder / ABOUT).get("set"))
    if name not in SETUPS:
        raise L2R2Error(f"{name} {ELSEWHERE.get(name, 'is unknown here')}.")
    return name


def boxes_of(folder: Path, table: ImageTable, name: str) -> Path | None:
    """Return the box file for a set without boxes; None if it has boxes or masks.

    Raises:
        L2R2Error: when no training image has an object.
    """
    if (folder / "boxes.json").is_file():
        return folder / "boxes.json"
    if any(row.may_have_object(0) for row in table.of_split("train").rows):
        return None
    raise L2R2Error(
        f"the training images of {name} have no boxes; make {folder / 'boxes.json'} with `l2r2 localize`"
        + (" or import it --with CUB-200-2011." if name == "waterbirds" else ".")
    )


def rows_of(folder: Path, table: ImageTable, setup: Setup, seed: int) -> list[dict]:
    """Select the rows to use, with the split `held_out` if the set has no validation split."""
    used = {"train", *setup.tests, setup.val}
    rows = [row for row in read_rows(folder) if row["split"] in used]
    if setup.val is not None:
        return rows
    held = set(hold_out(table.of_split("train"), FRACTION, seed=seed)[1].names())
    return [{**row, "split": HELD_OUT} if row["file_name"] in held else row for row in rows]


def answers(run: Path, table: ImageTable, setup: Setup) -> Iterator[tuple[str, str, dict[str, tuple[Tensor, BranchLogits]]]]:
    """Yield the outputs of a run: both branches, and the paper's fusions.

    Yields:
        Name of the output, what it was fitted on, and its logits by test split.
    """
    checkpoint, store = load_checkpoint(run), run / "logits"
    judged = {split: branch_logits(checkpoint, table.of_split(split), store) for split in setup.tests}
    yield "full", "", {split: (data.logits["full"], data) for split, data in judged.items()}
    yield "fg", "", {s: (d.logits["fg"].where(d.has_fg[:, None], d.logits["full"]), d) for s, d in judged.items()}
    for name in ("average", "max_confidence"):
        fusion = create_fusion(name, 2, len(checkpoint.labels))
        yield name, "", {split: (fuse(fusion, data), data) for split, data in judged.items()}
    for backgrounds in FITTED_ON:
        data = logits_to_fit(checkpoint, table.of_split(setup.val or HELD_OUT), table.of_split("train"), backgrounds, store)
        fitted = fit(data, sorted({*affordable(data), "robust"}))
        candidates = {**{name: fitted[name] for name in affordable(data)}, **lead_alone(data)}
        chosen = choose(candidates, references(data)).name
        for label, candidate in (("robust", fitted["robust"]), (f"best_on_val: {chosen}", candidates[chosen])):
            yield label, backgrounds, {split: (fuse(candidate.fusion, d), d) for split, d in judged.items()}


def measure(logits: Tensor, data: BranchLogits, background: str | None) -> dict[str, float]:
    """Compute accuracy, macro accuracy and, if backgrounds are known, the worst class on a background, in percent."""
    predicted = logits.argmax(-1)
    found = {"accuracy": accuracy(predicted, data.labels), "macro_accuracy": macro_accuracy(predicted, data.labels)}
    if background is not None:
        groups = [f"{row.label} on {place}" for row, place in zip(data.table.rows, data.table.column(background))]
        found["worst_group"] = min(by_group(predicted, data.labels, groups).values())
    return {name: round(100 * value, 1) for name, value in found.items()}


def run_one(folder: Path, name: str, model: str, seed: int, options: argparse.Namespace) -> list[dict]:
    """Train one model with one seed on one set, and evaluate all its outputs on each test split."""
    setup, work = SETUPS[name], options.work / f"published_{options.start}" / name
    table = read_table(folder)
    boxes = boxes_of(folder, table, name)
    rows = write_rows(rows_of(folder, table, setup, seed), "", work / f"rows_s{seed}.csv", 0)
    settings = {"seed": seed, "size": options.size, "epochs": options.epochs, **MODELS[model]}
    recipe = recipe_of(options.start, RECIPES[options.start], model=options.model or NETWORKS[options.start], **settings)
    print(f"{name}, {model}, seed {seed}", flush=True)
    run = work / f"{model}_s{seed}"
    finetune(folder, recipe, run, metadata=rows, boxes=boxes, val_split=setup.val or HELD_OUT)
    found = []
    for answer, fitted_on, outputs in answers(run, read_table(folder, metadata=rows, boxes=boxes), setup):
        for split, (logits, data) in outputs.items():
            row = {"set": name, "model": model, "answer": answer, "fitted_on": fitted_on, "split": split, "seed": seed}
            row |= measure(logits, data, setup.background)
            row |= {"oracle": round(100 * oracle(list(data.logits.values()), data.labels), 1)} if answer == "full" else {}
            found.append({**row, "images": len(data), "with_object": int(data.has_fg.sum())})
    return found


def print_means(table: list[dict]) -> None:
    """Print mean and standard deviation of the accuracy over the seeds, per set, model and output."""
    by_answer: dict[tuple, list[float]] = defaultdict(list)
    for row in table:
        key = (row["set"], row["split"], row["model"], row["answer"].split(":")[0], row["fitted_on"])
        by_answer[key].append(row["accuracy"])
    for (name, split, model, answer, fitted_on), values in by_answer.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0
        mean = f"{statistics.mean(values):5.1f} ± {spread:4.1f}"
        print(f"{name:20} {split:16} {model:12} {answer:15} {fitted_on:6} {mean}   {len(values)} seeds")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="folders that `l2r2 import` wrote")
    parser.add_argument("--start", choices=list(NETWORKS), default="pretrained")
    parser.add_argument("--model", help="default: EfficientNet-Lite0, or ResNet-18 from scratch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="the table; default benchmarks/results/published_START.csv")
    options = parser.parse_args()
    out = options.out or RESULTS / f"published_{options.start}.csv"
    backbone = options.model or NETWORKS[options.start]
    about = about_run(
        backbone=backbone,
        start=options.start,
        recipe=RECIPES[options.start],
        pixels=options.size,
        epochs=options.epochs,
        precision=PRECISIONS[options.start],
    )
    table: list[dict] = []
    left = list(SETUPS)
    for folder in options.data:
        try:
            name = name_of(folder)
            for seed in options.seeds:
                for model in options.models:
                    table += run_one(folder, name, model, seed, options)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    write_table(table, out, about)
            left = [other for other in left if other != name]
        except L2R2Error as error:
            print(f"skipped {folder}: {error}", flush=True)
    print_means(table)
    if table:
        print(f"wrote {out}")
    if left:
        print(f"not evaluated: {', '.join(left)}; see docs/datasets.md")


if __name__ == "__main__":
    main()

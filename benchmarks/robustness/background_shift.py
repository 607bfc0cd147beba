"""The cost of changed backgrounds: plain classifiers, controls, the paper's two networks, and L2R2, on two sets of real pixels.

    python benchmarks/robustness/background_shift.py fod_a_shift DATA            [--seeds 0 1 2] [--models plain shared ...]
    python benchmarks/robustness/background_shift.py composites  OBJECTS SCENES  [--seeds 0 1 2]

fod_a_shift: DATA is an imagefolder whose metadata.csv has the splits train (background correlated with class), train_minority
(other backgrounds), test_id and test_ood. The training set is `train` and 38 rows of `train_minority`, drawn with the run's seed,
which makes a correlation of 95 %. The last 15 % of each class's rows of `train` (rows are frames in order) are held out as `val`.
composites: OBJECTS, cut out by their masks, on SCENES, generated for each seed (`l2r2 composite`: 97 % and 87 % correlation in
two environments); `val` has other physical objects on other scenes, with the same correlation as in training.

`ceiling` is the shared network trained on all rows of `train_minority`, i.e. on every condition.

All networks are trained with the same recipe (batch 16), and evaluated with the weights of the last epoch. With `--start
pretrained`, the default: EfficientNet-Lite0 from the installed ImageNet weights, recipe `few_images` (or `--recipe`), 128 pixels,
10 epochs (composites: 4), fp32. With `--start scratch`: ResNet-18, recipe `scratch`, 96 pixels, 20 epochs (composites: 64
pixels, 4 epochs), bf16.

Fusions are fitted and chosen (by regret, see `l2r2 fuse`) on `val` (plain), on `val` with the backgrounds of other training
images (swapped), and on both; `adapted` fuses random groups of images of a test split jointly. On composites, the
cross-validation keeps physical objects together (`l2r2 fuse --group object`). Nothing is fitted or chosen on a test split. The
same command continues an interrupted benchmark. Writes benchmarks/results/background_shift_NAME_START.csv, with the recipe in the
name if it is another one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.spawrious import composites
from l2r2_models.data.table import ImageTable, read_table
from l2r2_models.evaluate.backgrounds import BACKGROUNDS, logits_to_fit
from l2r2_models.evaluate.choose import choose, lead_alone, references
from l2r2_models.evaluate.fuse import affordable, fit, fuse, is_swapped, observations
from l2r2_models.evaluate.logits import BranchLogits, branch_logits
from l2r2_models.evaluate.metrics import accuracy, by_group, oracle
from l2r2_models.fusion import FUSIONS, Fusion, create_fusion, fit_batch, fuse_groups
from l2r2_models.fusion.calibration import expected_calibration_error
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

MINORITY, HELD_OUT = 38, 0.15
SPLITS = ("test_id", "test_ood")
PRECISIONS = {"pretrained": "fp32", "scratch": "bf16"}  # depthwise convolutions are slower in bf16 on a CPU
RECIPES = {"pretrained": "few_images", "scratch": "scratch"}
NETWORKS = {"pretrained": "l2r2_efficientnet_lite0", "scratch": "l2r2_resnet18"}
PIXELS = {
    "pretrained": {"fod_a_shift": 128, "composites": 128},
    "scratch": {"fod_a_shift": 96, "composites": 64},
}
EPOCHS = {
    "pretrained": {"fod_a_shift": 10, "composites": 4},
    "scratch": {"fod_a_shift": 20, "composites": 4},
}
SIDE = {"fod_a_shift": 300, "composites": 128}  # side of the images in pixels
GROUP = {"fod_a_shift": None, "composites": "object"}  # column that groups photos of the same physical object
GROUP_SIZES = (8, 32, 0)  # images fused jointly; 0: the whole split
RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Model:
    """A compared model: changes to the common recipe, the control that replaces the given boxes, and other training rows."""

    changes: dict[str, Any] = field(default_factory=dict)
    control: str = ""
    all_conditions: bool = False  # trained on the rows of every background, as a ceiling
    recipe: str = ""  # instead of the common one
    first: tuple[str, str] | None = None  # key of the recipe, and the model trained before whose run it names


PLAIN = {"branches": ("full",)}
GROUPS = {"group": "background"}  # with the classes
MODELS = {
    "plain": Model(PLAIN),
    "center crop": Model({"branches": ("fg",)}, "center"),
    "random zoom": Model({"branches": ("fg",)}, "random"),
    "independent": Model({"shared": False}),
    "plain, balanced": Model({**PLAIN, **GROUPS, "balanced": True}),
    "plain, group dro": Model({**PLAIN, **GROUPS, "objective": "group_dro"}),
    "plain, dfr on train": Model({**PLAIN, **GROUPS, "balanced": True}, recipe="head_only", first=("init", "plain")),
    "plain, short": Model({**PLAIN, "epochs": 2}),
    "plain, jtt": Model({**PLAIN, "jtt_factor": 6}, first=("jtt", "plain, short")),
    "shared": Model(),
    "masked_crop": Model({"fg_mode": "masked_crop"}),
    "plain, swapped": Model({**PLAIN, "background_swap": 0.5}),
    "shared, swapped": Model({"background_swap": 0.5}),
    "shared, consistent": Model({"consistency": 4.0}),
    "ceiling": Model({"epochs": 5}, all_conditions=True),  # 2,772 rows instead of 650
}


def control_box(row: dict, control: str, side: int) -> dict:
    """Replace the box of a row by the center of the image, or by a random box of the same size, seeded by file name."""
    if control == "center":
        x0 = y0 = side / 4
        x1 = y1 = 3 * side / 4
    else:
        w, h = (float(row[b]) - float(row[a]) for a, b in (("x0", "x1"), ("y0", "y1")))
        draw = random.Random(f"control {row['file_name']}")
        x0, y0 = draw.uniform(0, max(0.0, side - w)), draw.uniform(0, max(0.0, side - h))
        x1, y1 = x0 + w, y0 + h
    return {**row, "x0": x0, "y0": y0, "x1": x1, "y1": y1}


def read_rows(data: Path) -> list[dict]:
    """Read the rows of a data set's metadata.csv."""
    with open(data / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def fod_rows(data: Path, seed: int, all_conditions: bool = False) -> list[dict]:
    """Select the rows of one seed, with `val` from the end of each class's training frames."""
    rows = read_rows(data)
    minority = [row for row in rows if row["split"] == "train_minority"]
    minority = minority if all_conditions else random.Random(seed).sample(minority, MINORITY)
    by_class = defaultdict(list)
    for row in rows:
        if row["split"] == "train":
            by_class[row["label"]].append(row)
    val = {row["file_name"] for group in by_class.values() for row in group[len(group) - round(HELD_OUT * len(group)) :]}
    kept = [row for row in rows if row["split"] in ("train", *SPLITS)] + [{**row, "split": "train"} for row in minority]
    return [{**row, "split": "val"} if row["file_name"] in val else row for row in kept]


def write_rows(rows: list[dict], control: str, out: Path, side: int) -> Path:
    """Write a metadata file, with the boxes of the control if there is one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(control_box(row, control, side) if control else row for row in rows)
    return out


def outputs_of(
    run: Path, table: ImageTable, group: str | None
) -> Iterator[tuple[str, str, dict[str, tuple[torch.Tensor, BranchLogits]]]]:
    """Yield the outputs of a run: its branches, all fusions, and the fusion chosen on each kind of validation rows.

    Yields:
        Name of the output, what it was fitted on, and its logits by test split.
    """
    checkpoint, store = load_checkpoint(run), run / "logits"
    judged = {split: branch_logits(checkpoint, table.of_split(split), store) for split in SPLITS}
    branches = list(judged[SPLITS[0]].logits)
    for branch in branches:
        yield branch, "", {split: (data.logits[branch], data) for split, data in judged.items()}
    if len(branches) < 2:
        return
    fusions = {(name, ""): create_fusion(name, len(branches), len(checkpoint.labels)) for name in FUSIONS}
    fusions = {key: fusion for key, fusion in fusions.items() if fusion.count() == 0}
    for backgrounds in BACKGROUNDS:
        data = logits_to_fit(checkpoint, table.of_split("val"), table.of_split("train"), backgrounds, store)
        counts = class_counts(table.of_split("train"), checkpoint.labels)
        fitted = fit(data, list(FUSIONS), group=group, train_counts=counts)
        fusions.update({(name, backgrounds): f.fusion for name, f in fitted.items() if f.fusion.count()})
        candidates = {**{name: fitted[name] for name in affordable(data)}, **lead_alone(data, group=group)}
        chosen = choose(candidates, references(data, group)).name
        fusions["chosen: " + chosen, backgrounds] = candidates[chosen].fusion
        if backgrounds == "both":
            fusion, rows = candidates[chosen].fusion, data.select(data.has_fg)
            fusion.batch = fit_batch(fusion, rows.logits, rows.labels, observations(rows), is_swapped(rows), counts)
            for size in GROUP_SIZES:
                yield f"adapted: {size or 'split'}", backgrounds, {s: (adapted(fusion, d, size), d) for s, d in judged.items()}
    for (name, backgrounds), fusion in fusions.items():
        yield name, backgrounds, {split: (fuse(fusion, data), data) for split, data in judged.items()}


def recipe_of(start: str, name: str | None = None, **changes: Any) -> Recipe:
    """Make the recipe that all networks of a table share; `name` defaults to the recipe of the start."""
    settings = {"model": NETWORKS[start], "batch_size": 16, "precision": PRECISIONS[start], "channels_last": True}
    return Recipe.read(name or RECIPES[start], {**settings, **changes})


def class_counts(table: ImageTable, labels: Sequence[str]) -> torch.Tensor:
    """Count the training rows per class."""
    counts = table.label_counts()
    return torch.tensor([float(counts[label]) for label in labels])


def adapted(fusion: Fusion, data: BranchLogits, size: int) -> torch.Tensor:
    """Fuse with `fuse_groups` in random groups of `size` images (seed 0); with 0, the whole split is one group."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    groups = (order // size).tolist() if size else [0] * len(data)
    return fuse_groups(fusion, data.logits, data.has_fg, groups, data.objectness).logits


def train(data: Path, rows: Path, name: str, seed: int, work: Path, options: argparse.Namespace) -> tuple[Path, Recipe]:
    """Train one model with one seed, after the model that it starts from."""
    model, run = MODELS[name], work / f"{name.replace(' ', '_').replace(',', '')}_s{seed}"
    changes = {"seed": seed, "size": options.size, "epochs": options.epochs, **model.changes}
    if model.first is not None:
        key, before = model.first
        changes[key] = str(train(data, rows, before, seed, work, options)[0])
    recipe = recipe_of(options.start, model.recipe or options.recipe, **changes)
    print(f"{name}, seed {seed}", flush=True)
    finetune(data, recipe, run, metadata=rows, val_split="val")
    return run, recipe


def run_one(data: Path, rows: Path, name: str, seed: int, work: Path, options: argparse.Namespace) -> list[dict]:
    """Train one model with one seed and evaluate all its outputs."""
    run, recipe = train(data, rows, name, seed, work, options)
    found = []
    for answer, fitted_on, outputs in outputs_of(run, read_table(data, metadata=rows), GROUP[options.name]):
        row: dict[str, Any] = {"model": name, "answer": answer, "fitted_on": fitted_on, "seed": seed, "epochs": recipe.epochs}
        for split, (logits, judged) in outputs.items():
            predicted = logits.argmax(-1)
            backgrounds = by_group(predicted, judged.labels, judged.table.column("background"))
            row[split] = round(100 * accuracy(predicted, judged.labels), 1)
            row[f"{split}_worst_background"] = round(100 * min(backgrounds.values()), 1)
            row[f"{split}_ece"] = round(100 * expected_calibration_error(logits, judged.labels), 1)
            if answer == "full" and len(judged.logits) > 1:
                row[f"{split}_oracle"] = round(100 * oracle(list(judged.logits.values()), judged.labels), 1)
        found.append(row)
    return found


def about_run(**settings: Any) -> dict[str, Any]:
    """Collect the columns that every row of a result file has: settings, device, versions and date."""
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "timm", "transformers")}
    return {**settings, "device": device, **versions, "date": datetime.date.today().isoformat()}


def write_table(table: list[dict], out: Path, about: dict) -> None:
    """Write a result file; what a row says of itself goes before what holds for all."""
    names = dict.fromkeys(key for row in table for key in row if key not in about)
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about])
        writer.writeheader()
        writer.writerows({**about, **row} for row in table)


def print_means(table: list[dict]) -> None:
    """Print mean and standard deviation over the seeds; the chosen fusion may differ between seeds."""
    by_answer: dict[tuple, list[dict]] = defaultdict(list)
    for row in table:
        by_answer[row["model"], row["answer"].split(":")[0], row["fitted_on"]].append(row)
    for (model, answer, fitted_on), rows in by_answer.items():
        cells = []
        for split in SPLITS:
            values = [row[split] for row in rows]
            cells.append(f"{split} {statistics.mean(values):5.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:4.1f}")
        print(f"{model:16} {answer:24} {fitted_on:8} {'   '.join(cells)}   {len(rows)} seeds")


def data_of(options: argparse.Namespace, seed: int, work: Path) -> tuple[Path, list[dict]]:
    """Return the folder of the data set, and its rows for a seed."""
    if options.name == "fod_a_shift":
        return options.data[0], fod_rows(options.data[0], seed)
    folder = composites(*options.data, work / f"data_s{seed}", size=SIDE[options.name], seed=seed)
    return folder, read_rows(folder)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SIDE))
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--start", choices=list(NETWORKS), default="pretrained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--recipe", choices=("finetune", "few_images", "head_only"), help="with pretrained weights; default as above"
    )
    parser.add_argument("--epochs", type=int, help="fewer for a quick try; default as above")
    parser.add_argument("--work", type=Path, default=Path("runs"))
    options = parser.parse_args()
    options.size = PIXELS[options.start][options.name]
    options.epochs = options.epochs or EPOCHS[options.start][options.name]
    options.recipe = options.recipe or RECIPES[options.start]
    case = f"{options.name}_{options.start}{'' if options.recipe == RECIPES[options.start] else '_' + options.recipe}"
    work = options.work / case
    about = about_run(
        backbone=NETWORKS[options.start],
        start=options.start,
        recipe=options.recipe,
        pixels=options.size,
        epochs=options.epochs,
        precision=PRECISIONS[options.start],
    )
    table: list[dict] = []
    for seed in options.seeds:
        data, rows = data_of(options, seed, work)
        for name in options.models:
            model = MODELS[name]
            if model.changes.get("fg_mode") == "masked_crop" and "mask_file" not in rows[0]:
                continue
            if model.all_conditions and options.name != "fod_a_shift":
                continue
            used = fod_rows(data, seed, all_conditions=True) if model.all_conditions else rows
            kind = "all" if model.all_conditions else model.control or "given"
            file = write_rows(used, model.control, work / f"rows_{kind}_s{seed}.csv", SIDE[options.name])
            table += run_one(data, file, name, seed, work, options)
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_table(table, RESULTS / f"background_shift_{case}.csv", about)
    print_means(table)


if __name__ == "__main__":
    main()

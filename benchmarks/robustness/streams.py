"""Mixed streams and the shift meter: what the estimate of misleading backgrounds is worth when a batch is not all of one kind.

    python benchmarks/robustness/background_shift.py NAME DATA ... --models shared --work WORK     # first, with the same options
    python benchmarks/robustness/streams.py          NAME DATA ... --work WORK [--start pretrained] [--seeds 0 1 2]

Each seed's `shared` network gets the fusion that `l2r2 fuse` chooses on plain and swapped validation rows, with its batch rule.

stream  batches of 32 test images, of which 0, 25, 50, 75 or 100 % are of test_ood and the others of test_id, drawn with the
        seed, 40 batches each: accuracy of fg, the average of the logits, the chosen fusion, and `--adapt batch:32`
meter   120 images of test_id, of which that share is moved to the background of a random training image, 20 draws: the estimated
        share of misleading backgrounds (mean and standard deviation), the mean of its 95 % interval, and in how many % of the
        draws the interval contains the true share

Nothing is fitted on a test row. Writes benchmarks/results/streams_NAME_START.csv.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from background_shift import (
    EPOCHS,
    GROUP,
    NETWORKS,
    PIXELS,
    RECIPES,
    RESULTS,
    SIDE,
    SPLITS,
    about_run,
    class_counts,
    data_of,
    write_rows,
    write_table,
)
from torch import Tensor

from l2r2_models.checkpoints.checkpoint import Checkpoint, load_checkpoint
from l2r2_models.data.table import ImageTable, read_table
from l2r2_models.evaluate.backgrounds import logits_to_fit
from l2r2_models.evaluate.choose import choose, lead_alone, references
from l2r2_models.evaluate.fuse import affordable, fit, fuse, is_swapped, observations
from l2r2_models.evaluate.logits import BranchLogits, branch_logits
from l2r2_models.fusion import FUSIONS, Fusion, fit_batch, fuse_groups

SHARES = (0, 25, 50, 75, 100)  # in %
BATCH, BATCHES = 32, 40
METER, DRAWS = 120, 20  # images per estimate, and estimates


def chosen_fusion(checkpoint: Checkpoint, table: ImageTable, store: Path, group: str | None) -> Fusion:
    """Fit and choose on plain and swapped validation rows, and fit the batch rule, as `l2r2 fuse` does."""
    data = logits_to_fit(checkpoint, table.of_split("val"), table.of_split("train"), "both", store)
    counts = class_counts(table.of_split("train"), checkpoint.labels)
    fitted = fit(data, list(FUSIONS), group=group, train_counts=counts)
    candidates = {**{name: fitted[name] for name in affordable(data)}, **lead_alone(data, group=group)}
    fusion = candidates[choose(candidates, references(data, group)).name].fusion
    rows = data.select(data.has_fg)
    fusion.batch = fit_batch(fusion, rows.logits, rows.labels, observations(rows), is_swapped(rows), counts)
    return fusion


def drawn_from(data: BranchLogits, among: Tensor, count: int, generator: torch.Generator) -> BranchLogits:
    """Draw rows without replacement among those where `among` (`[N]` bool) is True."""
    rows = among.nonzero()[:, 0]
    keep = torch.zeros(len(data), dtype=torch.bool)
    keep[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return data.select(keep)


def stream(fusion: Fusion, home: BranchLogits, away: BranchLogits, share: int, seed: int) -> dict[str, float]:
    """Measure the accuracy on batches of which `share` % are away."""
    generator = torch.Generator().manual_seed(seed)
    count = round(BATCH * share / 100)
    found: dict[str, list[Tensor]] = {"fg": [], "average": [], "chosen": [], "adapted": []}
    for _ in range(BATCHES):
        drawn = ((home, BATCH - count), (away, count))
        parts = [drawn_from(data, torch.ones(len(data), dtype=torch.bool), n, generator) for data, n in drawn if n]
        logits = {branch: torch.cat([part.logits[branch] for part in parts]) for branch in parts[0].logits}
        has_fg, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("has_fg", "labels"))
        outputs = {
            "fg": logits["fg"],
            "average": (logits["full"] + logits["fg"]) / 2,
            "chosen": torch.cat([fuse(fusion, part) for part in parts]),
            "adapted": fuse_groups(fusion, logits, has_fg, [0] * len(labels)).logits,
        }
        for name, output in outputs.items():
            found[name].append((output.argmax(-1) == labels).double())
    return {name: round(100 * torch.cat(values).mean().item(), 1) for name, values in found.items()}


def meter(fusion: Fusion, data: BranchLogits, share: int, seed: int) -> dict[str, float]:
    """Estimate the share of misleading backgrounds among images of which `share` % have the background of another one."""
    generator, moved = torch.Generator().manual_seed(seed), is_swapped(data)
    count = round(METER * share / 100)
    drawn = ((~moved & data.has_fg, METER - count), (moved & data.has_fg, count))
    found = []
    for _ in range(DRAWS):
        parts = [drawn_from(data, among, n, generator) for among, n in drawn if n]
        logits = {branch: torch.cat([part.logits[branch] for part in parts]) for branch in parts[0].logits}
        has_fg = torch.cat([part.has_fg for part in parts])
        found.append(fuse_groups(fusion, logits, has_fg, [0] * len(has_fg)).shares[0])
    inside = [100 * s.low - 0.1 <= share <= 100 * s.high + 0.1 for s in found]  # the grid of e ends within 0.1 of 0 and 100 %
    means = {name: statistics.mean(100 * getattr(s, name) for s in found) for name in ("misled", "low", "high")}
    spread = statistics.pstdev(100 * s.misled for s in found)
    measured = {"estimate": means["misled"], "deviation": spread, "low": means["low"], "high": means["high"]}
    return {name: round(value, 1) for name, value in {**measured, "inside": 100 * statistics.mean(inside)}.items()}


def main() -> None:
    """Run the measurements from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SIDE))
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--start", choices=list(NETWORKS), default="pretrained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs"))
    options = parser.parse_args()
    work = options.work / f"{options.name}_{options.start}"
    about = about_run(
        backbone=NETWORKS[options.start],
        recipe=RECIPES[options.start],
        pixels=PIXELS[options.start][options.name],
        epochs=EPOCHS[options.start][options.name],
    )
    table: list[dict[str, Any]] = []
    for seed in options.seeds:
        data, rows = data_of(options, seed, work)
        run, file = work / f"shared_s{seed}", write_rows(rows, "", work / f"rows_given_s{seed}.csv", SIDE[options.name])
        images, checkpoint, store = read_table(data, metadata=file), load_checkpoint(run), run / "logits"
        fusion = chosen_fusion(checkpoint, images, store, GROUP[options.name])
        home, away = (branch_logits(checkpoint, images.of_split(split), store) for split in SPLITS)
        moved = logits_to_fit(checkpoint, images.of_split(SPLITS[0]), images.of_split("train"), "both", store)
        for share in SHARES:
            row = {"seed": seed, "away": share, **stream(fusion, home, away, share, seed), **meter(fusion, moved, share, seed)}
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            table.append(row)
        write_table(table, RESULTS / f"streams_{options.name}_{options.start}.csv", about)
    for share in SHARES:
        rows = [row for row in table if row["away"] == share]
        means = {name: statistics.mean(row[name] for row in rows) for name in rows[0] if name not in ("seed", "away")}
        print(f"{share:3} % away: " + "  ".join(f"{name} {value:.1f}" for name, value in means.items()))


if __name__ == "__main__":
    main()

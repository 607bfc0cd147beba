"""Accuracy against time for view sizes per branch, as `l2r2 benchmark --sizes` shows it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..data.table import read_table
from ..errors import L2R2Error
from ..models.cascade import has_own_views
from ..runs import LOGITS
from .fit_run import rows_of, warnings_of
from .fuse import Column, columns_of, fuse
from .logits import BranchLogits, Progress, branch_logits

BATCH = 8  # views per timed pass


@dataclass(frozen=True)
class Sizing:
    """One choice of view sizes.

    Attributes:
        sizes: side of the view in pixels by branch.
        accuracy: accuracy of the fused predictions.
        behind: accuracy that is lost against the most accurate sizes.
        error: its standard error over the images.
        seconds: time of the network per image: processor time on a CPU.
    """

    sizes: dict[str, int]
    accuracy: float
    behind: float
    error: float
    seconds: float

    @property
    def is_equal(self) -> bool:
        """Whether it is within one standard error of the most accurate sizes."""
        return self.behind <= self.error + 1e-9


@dataclass(frozen=True)
class SizeReport:
    """Result of `compare_sizes`.

    Attributes:
        rows: all sizes that were compared, the fastest first.
        chosen: the fastest sizes whose accuracy is within one standard error of the highest.
        current: the sizes of the run.
        images: number of images that the accuracy was measured on.
        warnings: what makes the accuracies too optimistic, in sentences.
    """

    rows: tuple[Sizing, ...]
    chosen: Sizing
    current: Sizing
    images: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def compare_sizes(
    run: Path | str,
    data: Path,
    sizes: Sequence[int],
    *,
    split: str = "val",
    metadata: Path | None = None,
    boxes: Path | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    repeats: int = 3,
    progress: Progress = lambda batches, _: batches,
) -> SizeReport:
    """Measure the accuracy and the time of a run at every combination of view sizes; a bg view has the size of fg.

    The run is not trained again, so sizes far from its own are underestimated.

    Args:
        run: run folder or Hub id.
        data, metadata, boxes: see `read_table`.
        sizes: sides to try for each branch, besides those of the run.
        split: held-out split, see `rows_of`; never the one to evaluate on.
        skip_bad, workers, progress: see `branch_logits`.
        repeats: number of timed passes per branch and size, after one of warm-up; the median is reported.

    Raises:
        L2R2Error: when a size is out of range or the backbone does not take it, the branches share their views, or the split is
            unusable.
    """
    checkpoint = load_checkpoint(run)
    if not has_own_views(checkpoint.model):
        raise L2R2Error(f"{checkpoint.name}: its fg is masked or found inside the network, so its views cannot have other sizes.")
    model, spec = checkpoint.model, checkpoint.model.view_spec
    current = {b: spec.size_of(b) for b in model.branches}
    sides = sorted({*sizes, *current.values()})
    specs = {side: replace(spec, size=side, sizes={}) for side in sides}
    for of_side in specs.values():  # before anything is computed
        model.view_spec = of_side
    table = rows_of(run, read_table(data, metadata=metadata, boxes=boxes), split)
    store = Path(run) / LOGITS if Path(run).is_dir() else None

    def logits_at(side: int) -> BranchLogits:
        model.view_spec = specs[side]
        return branch_logits(checkpoint, table, store, skip_bad=skip_bad, workers=workers, progress=progress)

    logits = {side: logits_at(side) for side in sides}
    seconds = _seconds(checkpoint, sides, repeats)
    compared = _combinations(model.branches, sides)
    compared += [] if current in compared else [current]
    columns = [columns_of(fuse(model.fusion, _joined(logits, c)), _joined(logits, c)) for c in compared]
    (kind,) = columns[0]
    rows = _sizings(compared, [column[kind] for column in columns], seconds)
    chosen = next(row for row in rows if row.is_equal)
    warnings = warnings_of(run, table, split, "so is the choice of sizes")
    (own,) = (row for row in rows if row.sizes == current)
    return SizeReport(tuple(rows), chosen, own, len({row.path for row in logits[sides[0]].table.rows}), warnings)


def _combinations(branches: Sequence[str], sides: Sequence[int]) -> list[dict[str, int]]:
    """Return the sizes by branch to compare."""
    free = [b for b in branches if b != "bg" or "fg" not in branches]
    found = [dict(zip(free, chosen)) for chosen in product(sides, repeat=len(free))]
    return [{b: sizes.get(b, sizes.get("fg", 0)) for b in branches} for sizes in found]


def _joined(logits: dict[int, BranchLogits], sizes: dict[str, int]) -> BranchLogits:
    """Return the logits of each branch at its own size."""
    first = logits[sizes.get("fg", next(iter(sizes.values())))]
    return replace(first, logits={b: logits[side].logits[b] for b, side in sizes.items()})


def _sizings(
    compared: Sequence[dict[str, int]], columns: Sequence[Column], seconds: dict[tuple[str, int], float]
) -> list[Sizing]:
    best = max(columns, key=lambda column: column.accuracy)
    found = []
    for sizes, column in zip(compared, columns):
        gap = best.right - column.right
        error = float(gap.std(correction=0)) / len(gap) ** 0.5
        time = sum(seconds[pair] for pair in sizes.items())
        found.append(Sizing(sizes, column.accuracy, float(gap.mean()), error, time))
    return sorted(found, key=lambda row: row.seconds)


@torch.inference_mode()
def _seconds(checkpoint: Checkpoint, sides: Sequence[int], repeats: int) -> dict[tuple[str, int], float]:
    """Return the seconds per image of each branch at each size; rounds alternate between the sizes."""
    model = checkpoint.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    spent: dict[tuple[str, int], list[float]] = {}
    for turn in range(repeats + 1):
        for branch, side in product(model.branches, sides):
            views = {branch: torch.zeros(BATCH, model.in_chans, side, side, device=device)}
            start = _clock(device)
            model.forward_branches(**views)
            if turn:
                spent.setdefault((branch, side), []).append((_clock(device) - start) / BATCH)
    model.cpu()
    return {pair: median(times) for pair, times in spent.items()}


def _clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()

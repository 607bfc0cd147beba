"""Fitting of fusions on stored branch logits, and their cross-validated metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import L2R2Error
from ..fusion import FUSIONS, Fusion, create_fusion, fuse_branches, fused_logits
from ..fusion.calibration import expected_calibration_error
from .logits import BranchLogits
from .metrics import row_weights

BEST = "best_on_val"
FOLDS = 5
IMAGES_PER_PARAMETER = 10  # rule of ten (Peduzzi et al. 1996); with fewer, fits overfit to similar frames
PLAIN, SWAPPED = "plain", "swapped"  # held-out rows, unchanged and on the backgrounds of other images


@dataclass(frozen=True)
class Column:
    """Metrics on one kind of held-out rows.

    Attributes:
        accuracy: accuracy, or macro accuracy if that is the metric.
        ece: expected calibration error.
        nll: mean of `-log p(label)`.
        right: `[images]` or `[groups]` fraction of correct rows per image or group; for macro accuracy, rows are weighted by
            the inverse frequency of their class.
    """

    accuracy: float
    ece: float
    nll: float
    right: Tensor


@dataclass(frozen=True)
class Fitted:
    """A fusion fitted on all rows, and its cross-validated metrics.

    Attributes:
        fusion: the fitted fusion.
        columns: metrics by kind of rows (`plain`, `swapped`), for the kinds present. Each row is fused by a fusion fitted on the
            other folds (five, split by image or group, seed 0), so that memorizing rows does not help.
        logits: `[N, classes]` fused logits that the metrics were computed on.
    """

    fusion: Fusion
    columns: dict[str, Column]
    logits: Tensor

    @property
    def accuracy(self) -> float:
        """Mean over the columns."""
        return sum(column.accuracy for column in self.columns.values()) / len(self.columns)


def fuse(fusion: Fusion, data: BranchLogits) -> Tensor:
    """Return the fused logits `[N, classes]`, fused as in the model."""
    return fuse_branches(fusion, data.logits, data.has_fg, data.objectness)


def fit(
    data: BranchLogits,
    methods: Sequence[str | Mapping[str, Any]] | None = None,
    class_wise: bool = False,
    group: str | None = None,
    *,
    inputs: Sequence[str] | None = None,
    metric: str = "accuracy",
    train_counts: Tensor | None = None,
) -> dict[str, Fitted]:
    """Fit fusions on the rows in which an object was found.

    Args:
        data: logits of held-out rows of a model with two branches or more, on their own backgrounds, on others (`swapped`), or
            both. The several other backgrounds of an object count as one observation.
        methods: names or configs (see `create_fusion`) of fusions; defaults to `affordable`.
        class_wise: fit one temperature per class, for fusions that scale logits.
        group: a metadata column (site, physical object): its rows stay in one fold and count as one, since they are not
            independent. A row with an empty value is its own group.
        inputs: the branches to fuse; defaults to all.
        metric: `accuracy` or `macro_accuracy`, used to fit thresholds and weights and to compare fusions.
        train_counts: `[classes]` training rows per class; defaults to the counts of the held-out rows.

    Raises:
        L2R2Error: when a method or column is unknown, the model has one branch, there are fewer than ten images with an object
            or fewer than five groups, or all rows have the same class.
    """
    if len(data.logits) < 2:
        raise L2R2Error(f"Only a model with several branches can be fused; this one has only {', '.join(data.logits)}.")
    rows = data.select(data.has_fg)
    images = len({row.path for row in rows.table.rows})
    if images < 2 * FOLDS:
        found = f"An object was found in {images} of {len({row.path for row in data.table.rows})} images"
        raise L2R2Error(f"{found}; fitting a fusion takes at least {2 * FOLDS}; pass --boxes FILE if the boxes are in a file.")
    if len(rows.labels.unique()) < 2:
        raise L2R2Error(f"The {images} images with an object all have one class; fitting a fusion takes at least two.")
    if group is not None and (count := len(set(_unit_numbers(rows, group).tolist()))) < FOLDS:
        raise L2R2Error(f'The column "{group}" has {count} groups of images with an object; fitting takes at least {FOLDS}.')
    chosen = methods or affordable(data, inputs)
    counts = rows.labels.bincount(minlength=rows.classes) if train_counts is None else train_counts
    task = _Task(data, rows, class_wise, group, metric, counts)
    configs = [{"name": method} if isinstance(method, str) else method for method in chosen]
    return {config["name"]: _fit_one({**config, "inputs": inputs}, task) for config in configs}


def affordable(data: BranchLogits, inputs: Sequence[str] | None = None) -> list[str]:
    """List the fusions that have at most one parameter per ten images with an object."""
    images = len({row.path for row, found in zip(data.table.rows, data.has_fg.tolist()) if found})
    sizes = tuple(data.logits), data.classes
    made = [create_fusion({"name": name, "inputs": inputs}, *sizes) for name in sorted(FUSIONS)]
    return [fusion.name for fusion in made if IMAGES_PER_PARAMETER * fusion.count() <= images]


@dataclass(frozen=True)
class _Task:
    """The inputs shared by all fits: all rows, those with an object, and the arguments of `fit`."""

    data: BranchLogits
    rows: BranchLogits
    class_wise: bool
    group: str | None
    metric: str
    counts: Tensor


def _fit_one(config: Mapping[str, Any], task: _Task) -> Fitted:
    data, rows = task.data, task.rows
    weights = observations(rows) * row_weights(rows.labels, task.metric)

    def fitted(keep: Tensor) -> Fusion:
        sizes, part = (tuple(rows.logits), rows.classes), rows.select(keep)
        fusion = create_fusion(config, *sizes)
        if task.class_wise and "class_wise" in fusion.config():
            fusion = create_fusion({**config, "class_wise": True}, *sizes)
        found = fused_logits(fusion, part.logits)
        assert found is not None  # checked by `create_fusion`
        with torch.no_grad():
            fusion.set_prior(task.counts)
            fusion.fit(*found[1:], part.labels, weights[keep], is_swapped(part))
        return fusion

    final = fitted(torch.ones(len(rows), dtype=torch.bool))
    unit = _unit_numbers(rows, task.group)  # all rows of an image, on whatever background, stay in one fold
    fold = (torch.randperm(int(unit.max()) + 1, generator=torch.Generator().manual_seed(0)) % FOLDS)[unit]
    unseen = torch.empty(len(rows), rows.classes)
    for k in range(FOLDS if final.count() else 0):
        unseen[fold == k] = fuse(fitted(fold != k), rows.select(fold == k))
    fused = fuse(final, data)
    if final.count():
        fused[data.has_fg] = unseen
    return Fitted(final, columns_of(fused, data, task.group, task.metric), fused)


def columns_of(logits: Tensor, data: BranchLogits, group: str | None = None, metric: str = "accuracy") -> dict[str, Column]:
    """Compute the metrics of logits `[N, classes]` on the plain and the swapped rows of `data`, if present."""
    unit, found = _unit_numbers(data, group), {}
    for name, rows in kinds_of(data).items():
        z, labels = logits[rows], data.labels[rows]
        right = (z.argmax(-1) == labels).double() * row_weights(labels, metric)
        units = unit[rows].unique(return_inverse=True)[1]
        by_unit = torch.zeros(int(units.max()) + 1, dtype=right.dtype).index_add(0, units, right) / units.bincount()
        nll = float(cross_entropy(z.double(), labels))
        found[name] = Column(float(right.mean()), expected_calibration_error(z, labels), nll, by_unit)
    return found


def kinds_of(data: BranchLogits) -> dict[str, Tensor]:
    """Return the masks `[N]` bool of the plain and of the swapped rows, for the kinds that are present."""
    swapped = is_swapped(data)
    return {name: rows for name, rows in ((PLAIN, ~swapped), (SWAPPED, swapped)) if rows.any()}


def is_swapped(data: BranchLogits) -> Tensor:
    """Return a mask `[N]` bool of the rows that are on the background of another image."""
    return torch.tensor([row.background is not None for row in data.table.rows], dtype=torch.bool)


def observations(data: BranchLogits) -> Tensor:
    """Return the number of observations `[N]` per row: an object on k other backgrounds is k rows of 1 / k."""
    boxes = [None if row.entry is None else row.entry.boxes for row in data.table.rows]
    keys = [(row.path, b, row.mask_file, row.background is not None) for row, b in zip(data.table.rows, boxes)]
    count = Counter(keys)
    return torch.tensor([1 / count[key] for key in keys], dtype=torch.double)


def _unit_numbers(data: BranchLogits, group: str | None) -> Tensor:
    """Return the index `[N]` of the image, or of the group, of each row."""
    paths = [str(row.path) for row in data.table.rows]
    units = paths if group is None else [value or path for value, path in zip(data.table.column(group), paths)]
    number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    return torch.tensor([number[unit] for unit in units])

"""Fitting fusions on stored branch logits, and choosing among them."""

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
IMAGES_A_NUMBER = 10  # the rule of ten of regression (Peduzzi et al. 1996); with fewer, neighboring frames are learned by heart
PLAIN, SWAPPED = "plain", "swapped"  # held-out rows as they are, and on the backgrounds of other images


@dataclass(frozen=True)
class Column:
    """Metrics on one kind of held-out rows.

    Attributes:
        accuracy, ece, nll: of the rows; nll is the mean of `-log p(label)`. With `macro_accuracy`, `accuracy` holds that.
        right: `[images]` or `[groups]` share of each image's or group's rows that are right; with `macro_accuracy` rows of rare
            classes count for more.
    """

    accuracy: float
    ece: float
    nll: float
    right: Tensor


@dataclass(frozen=True)
class Fitted:
    """A fusion fitted on all rows, and its metrics on rows that it has not seen.

    Attributes:
        fusion: ready to use.
        columns: metrics by kind of rows, `plain` and `swapped`, of those that there are. Each row is fused by a fusion fitted on
            the other folds (five of the images or groups, seed 0), so that a fusion with many numbers gains nothing by learning
            the rows by heart.
    """

    fusion: Fusion
    columns: dict[str, Column]

    @property
    def accuracy(self) -> float:
        """Mean over the columns."""
        return sum(column.accuracy for column in self.columns.values()) / len(self.columns)


def fuse(fusion: Fusion, data: BranchLogits) -> Tensor:
    """Fused logits `[N, classes]`, as the model itself fuses them."""
    return fuse_branches(fusion, data.logits, data.has_fg, data.objectness)


def fit(
    data: BranchLogits,
    methods: Sequence[str] | None = None,
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
        methods: names; by default `affordable` ones.
        class_wise: one temperature a class, for the fusions that scale.
        group: a metadata column (site, physical object): its rows stay in one fold and count as one, for they are not
            independent. Rows with an empty value are groups of their own.
        inputs: the branches that are fused; all by default.
        metric: `accuracy` or `macro_accuracy`, by which thresholds and weights are fitted and fusions compared.
        train_counts: `[classes]` training rows of each class; the held-out rows' by default.

    Raises:
        L2R2Error: an unknown method or column, a model of one branch, fewer than ten images with an object or fewer than five
            groups, or rows of one class.
    """
    if len(data.logits) < 2:
        raise L2R2Error(f"Only a model with several branches can be fused; this one has {', '.join(data.logits)}.")
    rows = data.select(data.has_fg)
    images = len({row.path for row in rows.table.rows})
    if images < 2 * FOLDS:
        found = f"An object was found in {images} of {len({row.path for row in data.table.rows})} images"
        raise L2R2Error(f"{found}; a fusion is fitted on {2 * FOLDS} or more (are the boxes missing? give --boxes).")
    if len(rows.labels.unique()) < 2:
        raise L2R2Error(f"The {images} images with an object show one class only; a fusion needs more to be fitted.")
    if group is not None and (count := len(set(_unit_numbers(rows, group).tolist()))) < FOLDS:
        raise L2R2Error(f'The column "{group}" tells {count} groups of images with an object apart; a fit needs {FOLDS}.')
    chosen = methods or affordable(data, inputs)
    counts = rows.labels.bincount(minlength=rows.classes) if train_counts is None else train_counts
    task = _Task(data, rows, class_wise, group, metric, counts)
    return {name: _fit_one({"name": name, "inputs": inputs}, task) for name in chosen}


def affordable(data: BranchLogits, inputs: Sequence[str] | None = None) -> list[str]:
    """The fusions that may be chosen: those with at most one number to fit for ten images in which an object was found."""
    images = len({row.path for row, found in zip(data.table.rows, data.has_fg.tolist()) if found})
    sizes = tuple(data.logits), data.classes
    made = [create_fusion({"name": name, "inputs": inputs}, *sizes) for name in sorted(FUSIONS)]
    return [fusion.name for fusion in made if IMAGES_A_NUMBER * fusion.count() <= images]


@dataclass(frozen=True)
class _Task:
    """What every fusion is fitted on: all rows, those with an object, and the arguments of `fit`."""

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
        assert found is not None  # `create_fusion` has seen to it
        with torch.no_grad():
            fusion.set_prior(task.counts)
            fusion.fit(*found[1:], part.labels, weights[keep], is_swapped(part))
        return fusion

    final = fitted(torch.ones(len(rows), dtype=torch.bool))
    unit = _unit_numbers(rows, task.group)  # an image that occurs several times, on several backgrounds, stays in one fold
    fold = (torch.randperm(int(unit.max()) + 1, generator=torch.Generator().manual_seed(0)) % FOLDS)[unit]
    unseen = torch.empty(len(rows), rows.classes)
    for k in range(FOLDS if final.count() else 0):
        unseen[fold == k] = fuse(fitted(fold != k), rows.select(fold == k))
    fused = fuse(final, data)
    if final.count():
        fused[data.has_fg] = unseen
    return Fitted(final, columns_of(fused, data, task.group, task.metric))


def columns_of(logits: Tensor, data: BranchLogits, group: str | None = None, metric: str = "accuracy") -> dict[str, Column]:
    """Metrics of `[N, classes]` logits on the plain and on the swapped rows of `data`, of those that there are."""
    swapped, unit = is_swapped(data), _unit_numbers(data, group)
    found = {}
    for name, rows in ((PLAIN, ~swapped), (SWAPPED, swapped)):
        if rows.any():
            z, labels = logits[rows], data.labels[rows]
            right = (z.argmax(-1) == labels).double() * row_weights(labels, metric)
            units = unit[rows].unique(return_inverse=True)[1]
            by_unit = torch.zeros(int(units.max()) + 1, dtype=right.dtype).index_add(0, units, right) / units.bincount()
            nll = float(cross_entropy(z.double(), labels))
            found[name] = Column(float(right.mean()), expected_calibration_error(z, labels), nll, by_unit)
    return found


def is_swapped(data: BranchLogits) -> Tensor:
    """`[N]` bool, which rows lie on the background of another image."""
    return torch.tensor([row.background is not None for row in data.table.rows], dtype=torch.bool)


def observations(data: BranchLogits) -> Tensor:
    """`[N]` how many observations each row stands for: an object on k other backgrounds is k rows of 1 / k."""
    boxes = [None if row.entry is None else row.entry.boxes for row in data.table.rows]
    keys = [(row.path, b, row.mask_file, row.background is not None) for row, b in zip(data.table.rows, boxes)]
    count = Counter(keys)
    return torch.tensor([1 / count[key] for key in keys], dtype=torch.double)


def _unit_numbers(data: BranchLogits, group: str | None) -> Tensor:
    """`[N]` which image each row shows, or which group it is of."""
    paths = [str(row.path) for row in data.table.rows]
    units = paths if group is None else [value or path for value, path in zip(data.table.column(group), paths)]
    number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    return torch.tensor([number[unit] for unit in units])

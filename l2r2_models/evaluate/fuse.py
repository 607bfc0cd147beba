"""Fitting fusions on stored branch logits, and choosing among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from ..fusion import FUSIONS, Fusion, create_fusion, fuse_branches, fused_logits
from ..fusion.calibration import expected_calibration_error
from .logits import BranchLogits
from .metrics import row_weights

BEST = "best_on_val"
FOLDS = 5
IMAGES_A_NUMBER = 10  # the rule of ten of regression (Peduzzi et al. 1996); with fewer, neighboring frames are learned by heart


@dataclass(frozen=True)
class Fitted:
    """A fusion with its numbers, fitted on all rows, and what such a fit reaches on rows it has not seen.

    Attributes:
        fusion: ready to use. With the metric `macro_accuracy`, `accuracy` holds that.
        accuracy, ece: of each row fused by numbers that were fitted on the other folds (five of the images or groups, seed 0), so
            that a fusion with many numbers gains nothing by learning the rows by heart.
        right: `[images]` or `[groups]` part of each image's or group's rows that are right, likewise; with `macro_accuracy` rows
            of rare classes count for more.
    """

    fusion: Fusion
    accuracy: float
    ece: float
    right: Tensor


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
) -> dict[str, Fitted]:
    """Fit fusions on the rows in which an object was found.

    Args:
        data: logits of held-out rows of a model with two branches or more.
        methods: names; by default `affordable` ones.
        class_wise: one temperature a class, for the fusions that scale.
        group: a metadata column (site, physical object): its rows stay in one fold and count as one, for they are not
            independent. Rows with an empty value are groups of their own.
        inputs: the branches that are fused; all by default.
        metric: `accuracy` or `macro_accuracy`, by which thresholds and weights are fitted and fusions compared.

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
    return {name: _fit_one({"name": name, "inputs": inputs}, data, rows, class_wise, group, metric) for name in chosen}


def affordable(data: BranchLogits, inputs: Sequence[str] | None = None) -> list[str]:
    """The fusions that may be chosen: those with at most one number to fit for ten images in which an object was found."""
    images = len({row.path for row, found in zip(data.table.rows, data.has_fg.tolist()) if found})
    sizes = tuple(data.logits), data.classes
    made = [create_fusion({"name": name, "inputs": inputs}, *sizes) for name in sorted(FUSIONS)]
    return [fusion.name for fusion in made if IMAGES_A_NUMBER * fusion.count() <= images]


def _fit_one(
    config: Mapping[str, Any], data: BranchLogits, rows: BranchLogits, class_wise: bool, group: str | None, metric: str
) -> Fitted:
    def fitted(part: BranchLogits) -> Fusion:
        sizes = tuple(rows.logits), rows.classes
        fusion = create_fusion(config, *sizes)
        if class_wise and "class_wise" in fusion.config():
            fusion = create_fusion({**config, "class_wise": True}, *sizes)
        found = fused_logits(fusion, part.logits)
        assert found is not None  # `create_fusion` has seen to it
        with torch.no_grad():
            fusion.fit(*found[1:], part.labels, row_weights(part.labels, metric) if metric != "accuracy" else None)
        return fusion

    final = fitted(rows)
    unit = _unit_numbers(rows, group)  # an image that occurs several times, on several backgrounds, stays in one fold
    fold = (torch.randperm(int(unit.max()) + 1, generator=torch.Generator().manual_seed(0)) % FOLDS)[unit]
    unseen = torch.empty(len(rows), rows.classes)
    for k in range(FOLDS if final.count() else 0):
        unseen[fold == k] = fuse(fitted(rows.select(fold != k)), rows.select(fold == k))
    fused = fuse(final, data)
    if final.count():
        fused[data.has_fg] = unseen
    right = (fused.argmax(-1) == data.labels).double() * row_weights(data.labels, metric)
    unit = _unit_numbers(data, group)
    by_unit = torch.zeros(int(unit.max()) + 1, dtype=right.dtype).index_add(0, unit, right) / unit.bincount()
    return Fitted(final, float(right.mean()), expected_calibration_error(fused, data.labels), by_unit)


def _unit_numbers(data: BranchLogits, group: str | None) -> Tensor:
    """`[N]` which image each row shows, or which group it is of."""
    paths = [str(row.path) for row in data.table.rows]
    units = paths if group is None else [value or path for value, path in zip(data.table.column(group), paths)]
    number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    return torch.tensor([number[unit] for unit in units])


def best(fitted: dict[str, Fitted]) -> str:
    """The name of the fusion that is most accurate on unseen rows; among equals `robust`, then the one with the fewest fitted
    numbers (METHOD.md 4).

    Equal is what lags by no more than one standard error of the difference, taken over images or groups (the
    one-standard-error rule of Breiman et al. 1984): a hundred validation rows cannot tell fusions apart that differ in one of
    them, nor can a thousand photos of eight objects.
    """
    top = max(fitted.values(), key=lambda f: f.accuracy)
    equal = [name for name, f in fitted.items() if _lag(top, f) <= 1e-9]
    return max(equal, key=lambda name: (name == "robust", -fitted[name].fusion.count(), fitted[name].accuracy))


def _lag(top: Fitted, other: Fitted) -> float:
    """By how much more than a standard error of the difference `other` is behind."""
    difference = top.right - other.right
    return float(difference.mean() - difference.std() / len(difference) ** 0.5)

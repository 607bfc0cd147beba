"""The values of a recipe that are refused, alone or together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from ..data.splits import VAL_FROM
from ..errors import L2R2Error
from ..fusion import FUSIONS
from ..views import BRANCHES, ViewSpec

if TYPE_CHECKING:
    from .recipe import Recipe

TRAINABLE = ("all", "head")
AUTO: Final = "auto"
PRECISIONS = (AUTO, "fp32", "bf16", "fp16")
STRIDES = (0, 2, 4, 8, 16, 32)
BACKWARDS = ("joint", "separate")
OBJECTIVES = ("erm", "group_dro")
NO_METRIC = "none"
METRICS = (NO_METRIC, *(f"{name}_{kind}accuracy" for kind in ("", "macro_") for name in ("fused", *BRANCHES)))


def check_values(recipe: Recipe) -> None:
    """Check each value on its own.

    Raises:
        L2R2Error: when a value is out of range, or not one of the choices.
    """
    for name, most in {"epochs": 100_000, "batch_size": 1_000_000, "grad_accumulation": 1_000_000}.items():
        if not 1 <= getattr(recipe, name) <= most:
            raise L2R2Error(f"{name} must lie between 1 and {most:,}, got {getattr(recipe, name)}.")
    if recipe.workers > 256:
        raise L2R2Error(f"workers must lie between 0 and 256, got {recipe.workers}.")
    for name in ("box_threshold", "warmup", "label_smoothing", "mix_probability", "layer_decay", "background_swap"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise L2R2Error(f"{name} must lie between 0 and 1, got {getattr(recipe, name)}.")
    for name in ("drop", "drop_path", "ema", "momentum"):
        if not 0 <= getattr(recipe, name) < 1:
            raise L2R2Error(f"{name} must be at least 0 and below 1, got {getattr(recipe, name)}.")
    for name in ("weight_decay", "clip_grad", "mixup", "cutmix", "workers", "patience", "distill", "consistency"):
        if not 0 <= getattr(recipe, name) < math.inf:
            raise L2R2Error(f"{name} must be at least 0, got {getattr(recipe, name)}.")
    if not 0 <= recipe.val_fraction <= 0.5:
        raise L2R2Error(f"val_fraction must lie between 0 and 0.5, got {recipe.val_fraction}.")
    for name in ("lr", "layer_decay", "group_step"):
        if not 0 < getattr(recipe, name) < math.inf:
            raise L2R2Error(f"{name} must be above 0, got {getattr(recipe, name)}.")
    if not 0 <= recipe.seed < 2**32:
        raise L2R2Error(f"seed must lie between 0 and 4294967295, got {recipe.seed}.")
    if recipe.size is not None and not 1 <= recipe.size <= 4096:
        raise L2R2Error(f"size must lie between 1 and 4096 pixels, got {recipe.size}.")
    if lacking := [branch for branch in ViewSpec(sizes=recipe.sizes or {}).sizes if branch not in recipe.branches]:
        raise L2R2Error(f"sizes has a size for {lacking[0]}, but this model has {', '.join(recipe.branches)}; leave it out.")
    known: dict[str, tuple[Any, ...]] = {"trainable": TRAINABLE, "precision": PRECISIONS, "best_metric": METRICS}
    known |= {"val_from": VAL_FROM, "branch_backward": BACKWARDS, "frozen_stride": STRIDES, "objective": OBJECTIVES}
    for name, choices in known.items():
        if getattr(recipe, name) not in choices:
            raise L2R2Error(f'Unknown {name} "{getattr(recipe, name)}"; choose from {", ".join(map(str, choices))}.')
    if recipe.channels_last not in (AUTO, True, False):
        raise L2R2Error(f"channels_last must be auto, true or false, got {recipe.channels_last!r}.")


def check_combinations(recipe: Recipe) -> None:
    """Check the values against each other.

    Raises:
        L2R2Error: when they contradict each other, or one has no effect.
    """
    if (recipe.val_group or recipe.val_from != "random") and not recipe.val_fraction:
        raise L2R2Error(f"val_{'group' if recipe.val_group else 'from'} has no effect without val_fraction; set both.")
    if recipe.grad_accumulation > recipe.batch_size:
        raise L2R2Error(f"grad_accumulation {recipe.grad_accumulation} is larger than batch_size {recipe.batch_size}; lower it.")
    _check_best(recipe)
    _check_groups(recipe)
    _check_agreement(recipe)
    if recipe.init is not None and not recipe.pretrained:
        raise L2R2Error("init loads weights, but pretrained is false; use one or the other.")
    if recipe.frozen_stride and not recipe.pretrained:
        raise L2R2Error("frozen_stride keeps pretrained weights, but pretrained is false; leave one of them out.")
    if recipe.box_head and (recipe.mixup or recipe.cutmix):
        raise L2R2Error("mixup and cutmix cannot mix the boxes that a box head is trained on; use one or the other.")
    if recipe.fusion in FUSIONS and FUSIONS[recipe.fusion].needs_fit:
        raise L2R2Error(f'Fusion "{recipe.fusion}" must be fitted: train with another fusion, then run `l2r2 fuse`.')
    if recipe.threshold is not None and recipe.fusion != "robust":
        raise L2R2Error(f'threshold is for the fusion "robust", not for "{recipe.fusion}".')


def _check_best(recipe: Recipe) -> None:
    branch = recipe.best_metric.removesuffix("_accuracy").removesuffix("_macro")
    if branch in BRANCHES and branch not in recipe.branches:
        has = ", ".join(recipe.branches)
        raise L2R2Error(f"best_metric {recipe.best_metric} needs the branch {branch}; this model has {has}.")
    if recipe.patience and recipe.best_metric == NO_METRIC:
        raise L2R2Error("patience needs a metric to improve; set best_metric too, e.g. fused_accuracy.")


def _check_groups(recipe: Recipe) -> None:
    if recipe.objective == "erm":
        if recipe.group and not recipe.balanced:
            raise L2R2Error("group has no effect alone; set objective to group_dro, or balanced to true.")
        return
    if not recipe.group:
        raise L2R2Error("objective group_dro needs groups; set group to a metadata column, e.g. group=background.")
    if recipe.grad_accumulation > 1:
        raise L2R2Error("group_dro weighs the groups of a whole batch; set grad_accumulation to 1.")
    if recipe.mixup or recipe.cutmix:
        raise L2R2Error("mixup and cutmix mix images of different groups; do not use them with group_dro.")


def _check_agreement(recipe: Recipe) -> None:
    if recipe.distill and not {"full", "fg"} <= set(recipe.branches):
        raise L2R2Error(f"distill needs the branches full and fg; this model has {', '.join(recipe.branches)}, so set it to 0.")
    if recipe.distill and recipe.branch_backward == "separate":
        raise L2R2Error("distill compares two branches; set branch_backward to joint.")
    for name in ("distill", "consistency"):
        if getattr(recipe, name) and (recipe.mixup or recipe.cutmix):
            raise L2R2Error(
                f"mixup and cutmix mix other images into each view, so {name} has no views to compare; use one or the other."
            )

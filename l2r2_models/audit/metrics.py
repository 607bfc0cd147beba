"""Metrics of how much a model relies on the background, with bootstrap intervals (`docs/method.md`, section 9).

They are computed from per-image values by intervention, which `audit` collects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluate.metrics import bootstrap_counts, confidence_interval


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % confidence interval over images."""

    value: float
    low: float
    high: float


def foreground_sensitivity(fg: Tensor, bg: Tensor) -> Tensor:
    """Compute RFS, the relative foreground sensitivity, or iRFS from the probabilities of one image.

    Source: RIVAL10 (Moayeri et al. 2022), section 5; formula in `docs/method.md`, section 9.

    Args:
        fg, bg: `[...]` accuracies (or true-class probabilities) in [0, 1] under noise on the object, and on the background.

    Returns:
        `[...]` in [-1, 1]; positive if the object matters more, 0 where the mean of fg and bg is 0 or 1.

    >>> foreground_sensitivity(torch.tensor(0.25), torch.tensor(0.75)).item()
    0.5
    """
    fg, bg = fg.double(), bg.double()
    room = 2 * torch.minimum((fg + bg) / 2, 1 - (fg + bg) / 2)
    return torch.where(room > 0, (bg - fg) / room.clamp(min=1e-300), 0.0).clamp(-1, 1)  # rounding may exceed the bounds


class Means:
    """Means of per-image values, over all images and over bootstrap resamples of the images.

    Args:
        columns: `[N]` values by name; NaN values are ignored.
        images: `[N]` integers; rows of one image are resampled together.
        seed, draws: seed and number of resamples of the bootstrap.
        labels: `[N]`; if given, means within a class are averaged over classes (those in the resample).
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        images: Tensor,
        seed: int = 0,
        draws: int = 1000,
        labels: Sequence[str] | None = None,
    ) -> None:
        values = torch.stack([column.double() for column in columns.values()], 1)  # [N, C]
        counts, values = values.isfinite().double(), values.nan_to_num()
        classes = (
            [range(len(values))]
            if labels is None
            else [[i for i, label in enumerate(labels) if label == name] for name in sorted(set(labels))]
        )
        rows = [torch.tensor(list(of_class)) for of_class in classes]
        means = [
            torch.stack([w[:, i] @ values[i] / (w[:, i] @ counts[i]) for i in rows]).nanmean(0)  # [D, C]
            for w in _weights(images, seed, draws)
        ]
        self.means = dict(zip(columns, torch.cat(means).unbind(1)))  # [1 + draws] each, the images themselves first

    def __contains__(self, name: str) -> bool:
        return name in self.means and bool(self.means[name][0].isfinite())

    def __getitem__(self, name: str) -> Tensor:
        return self.means[name]


def estimate(values: Tensor) -> Estimate | None:
    """Make an estimate from `[1 + draws]` values, the metric on all images first; None if it is undefined (0 / 0)."""
    drawn = values[1:][values[1:].isfinite()]
    if not values[0].isfinite() or not len(drawn):
        return None
    return Estimate(float(values[0]), *confidence_interval(drawn))


def _weights(images: Tensor, seed: int, draws: int) -> Iterable[Tensor]:
    """Yield row weights `[D, N]` float64: first all ones, then the bootstrap resamples."""
    member = images.unique(return_inverse=True)[1]
    yield torch.ones(1, len(images), dtype=torch.double)
    for times in bootstrap_counts(int(member.max()) + 1, seed, draws):
        yield times[:, member]


def measures(
    right: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    images: Tensor,
    groups: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """Compute all metrics of one output.

    Args:
        right: `[N]` by intervention (see `perturbations.plan`): 1 correct, 0 wrong, NaN if it does not apply to the image.
        truth: `[N]` by intervention, the probability of the true class.
        images: `[N]` integers; rows of one image are resampled together.
        groups: `[N]` group names; adds `group: NAME` and `worst_group`.
        labels: `[N]` class names, over which the accuracies of RFS are averaged; None weighs all rows equally.
        seed, draws: seed and number of resamples of the bootstrap.

    Returns:
        Estimates by name, without undefined ones. Fractions in [0, 1]: `accuracy`; `fg_only`, `bg_only_mask`, `bg_only_box` and
        `tiled`, with `drop_bg_only_mask`, `drop_bg_only_box` and `drop_tiled` (relative loss of accuracy on the images of that
        intervention); `mixed_same`, `mixed_rand` (mean over its backgrounds), `mixed_next`; `challenge` (correct on the
        background of every other image), `challenge_upper_bound` (correct on all backgrounds of mixed_rand). Differences:
        `bg_gap` = mixed_same - mixed_rand, `swap_loss` = accuracy - mixed_rand. In [-1, 1], as in RIVAL10: `rfs` under noise of
        equal standard deviation (accuracies averaged over classes and levels first), `irfs` (per image and level, then
        averaged), `rfs_l2` and `irfs_l2` under noise of equal L2 norm. By level: `noise_fg_30`, `noise_bg_30`, `rfs_30`, ...,
        and the same with `l2_`.
    """
    columns = _columns(right, truth)
    names = sorted(set(groups)) if groups is not None else []
    for name in names:
        inside = torch.tensor([g == name for g in groups or ()])
        columns[f"group: {name}"] = right["original"].double().where(inside, torch.nan)
    m = Means(columns, images, seed, draws)
    noise = {name: values for name, values in columns.items() if name.startswith("noise_")}
    by_class = m if labels is None or not noise else Means(noise, images, seed, draws, labels)
    found: dict[str, Tensor] = {name: m[name] for name in columns if not name.startswith("at ")}
    found["accuracy"] = found.pop("original")
    for name in ("bg_only_mask", "bg_only_box", "tiled"):
        if name in m:
            found[f"drop_{name}"] = 1 - m[name] / m[f"at {name}"]
    if "mixed_rand" in m:
        found["swap_loss"] = m["at mixed_rand"] - m["mixed_rand"]
    if "bg_gap" in columns:
        found["bg_gap"] = m["bg_gap"]
    for kind in ("", "l2_"):
        levels = _levels(right, kind)
        for level in levels:
            found[f"rfs_{kind}{level}"] = foreground_sensitivity(*(by_class[f"noise_{kind}{w}_{level}"] for w in ("fg", "bg")))
        if levels:
            fg, bg = (torch.stack([by_class[f"noise_{kind}{w}_{level}"] for level in levels]).mean(0) for w in ("fg", "bg"))
            found[f"rfs{'_l2' if kind else ''}"] = foreground_sensitivity(fg, bg)
    if names:
        by_group = torch.stack([m[f"group: {name}"] for name in names])
        found["worst_group"] = by_group.nan_to_num(nan=torch.inf).amin(0)  # a group without resampled images is not the worst
    estimates = {name: estimate(values) for name, values in found.items()}
    return {name: f for name, f in estimates.items() if f is not None}


def _columns(right: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns to average; `at NAME` is the accuracy on the original images that have the intervention NAME."""
    columns = {name: values.double() for name, values in right.items() if not name.startswith("mixed_rand_")}
    if random := [values.double() for name, values in right.items() if name.startswith("mixed_rand_")]:
        drawn = torch.stack(random)  # [k, N], NaN if there are fewer than k backgrounds
        columns["mixed_rand"] = drawn.nanmean(0)
        columns["challenge_upper_bound"] = drawn.nan_to_num(nan=1.0).amin(0).where(drawn.isfinite().any(0), torch.nan)
    if "mixed_same" in columns and "mixed_rand" in columns:
        columns["bg_gap"] = columns["mixed_same"] - columns["mixed_rand"]
    for name in ("bg_only_mask", "bg_only_box", "tiled", "mixed_rand"):
        if name in columns:
            columns[f"at {name}"] = columns["original"].where(columns[name].isfinite(), torch.nan)
    for kind in ("", "l2_"):
        if levels := _levels(right, kind):
            fg, bg = (torch.stack([truth[f"noise_{kind}{w}_{level}"] for level in levels]) for w in ("fg", "bg"))  # [L, N]
            columns[f"irfs{'_l2' if kind else ''}"] = foreground_sensitivity(fg, bg).mean(0)
    return columns


def _levels(right: Mapping[str, Tensor], kind: str) -> list[str]:
    return [name.removeprefix(f"noise_{kind}fg_") for name in right if name.startswith(f"noise_{kind}fg_")]

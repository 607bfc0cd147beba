"""Metrics on logits (`docs/method.md`, section 9)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from ..fusion.calibration import expected_calibration_error

Interval = tuple[float, float]
METRICS = ("accuracy", "macro_accuracy")  # for model selection
CHUNK = 64  # bootstrap draws processed at once: 64 * 50,000 rows are 26 MB


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Compute the fraction of predictions `[N]` that equal the labels `[N]`.

    >>> accuracy(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]))
    0.75
    """
    return float((predictions == labels).double().mean())


def macro_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Compute the mean recall over the classes that occur in `labels`; other predicted classes do not count.

    >>> macro_accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    0.5
    """
    right = (predictions == labels).double()
    return float(torch.stack([right[labels == k].mean() for k in labels.unique()]).mean())


def row_weights(labels: Tensor, metric: str) -> Tensor:
    """Return weights `[N]` with sum N, such that the weighted fraction of correct rows is the metric.

    Raises:
        L2R2Error: when the metric is not `accuracy` or `macro_accuracy`.
    """
    if metric not in METRICS:
        raise L2R2Error(f'Unknown metric "{metric}"; choose from {", ".join(METRICS)}.')
    if metric == "accuracy":
        return torch.ones(len(labels), dtype=torch.double)
    _, number, count = labels.unique(return_inverse=True, return_counts=True)
    weights: Tensor = len(labels) / (len(count) * count.double())[number]
    return weights


def by_group(predictions: Tensor, labels: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Compute the accuracy per group, sorted by name; `groups` holds one name per row."""
    right = (predictions == labels).double()
    names = sorted(set(groups))
    return {name: float(right[torch.tensor([g == name for g in groups])].mean()) for name in names}


def recalls(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float | None]:
    """Compute the recall per class; None for a class without rows."""
    right = (predictions == labels).double()
    rows = {k: labels == k for k in labels.unique().tolist()}
    return {name: float(right[rows[k]].mean()) if k in rows else None for k, name in enumerate(classes)}


def measure(
    logits: Tensor,
    labels: Tensor,
    has_fg: Tensor,
    groups: Sequence[str] | None = None,
    *,
    classes: Sequence[str],
    clusters: Tensor | None = None,
    temperature: float | None = None,
    than: Tensor | None = None,
) -> dict[str, Any]:
    """Compute all metrics of one set of logits; a metric without rows is None.

    Args:
        logits: `[N, classes]`.
        labels: `[N]` int64 class indices.
        has_fg: `[N]` bool, True where an object was found.
        groups: one group name per row.
        classes: class names.
        clusters: see `bootstrap_interval`.
        temperature: temperature fitted on other rows.
        than: `[N, classes]` logits of the baseline for `gain`.

    Returns:
        `accuracy`, `macro_accuracy`, `ece`, `with_box`, `without_box`, `recall` by class; with a temperature `ece_scaled`; with
        `than` `gain`, the difference in accuracy; with groups `by_group` and `worst_group`. And `intervals`: the 95 % confidence
        intervals of `accuracy`, `macro_accuracy`, `with_box`, `without_box`, `gain` and `by_group`.
    """
    predictions = logits.argmax(-1)
    right = (predictions == labels).double()

    def of(rows: Tensor) -> tuple[float | None, Interval | None]:
        if not rows.any():
            return None, None
        inside = None if clusters is None else clusters[rows]
        return float(right[rows].mean()), bootstrap_interval(right[rows], clusters=inside)

    metrics: dict[str, Any] = {"macro_accuracy": macro_accuracy(predictions, labels)}
    intervals: dict[str, Any] = {"macro_accuracy": bootstrap_interval(right, clusters=clusters, classes=labels)}
    for name, rows in (("accuracy", torch.ones_like(has_fg)), ("with_box", has_fg), ("without_box", ~has_fg)):
        metrics[name], intervals[name] = of(rows)
    metrics["ece"] = expected_calibration_error(logits, labels)
    metrics["recall"] = recalls(predictions, labels, classes)
    if temperature is not None:
        metrics["ece_scaled"] = expected_calibration_error(logits / temperature, labels)
    if than is not None:
        difference = right - (than.argmax(-1) == labels).double()
        metrics["gain"] = float(difference.mean())
        intervals["gain"] = bootstrap_interval(difference, clusters=clusters)
    if groups is not None:
        metrics["by_group"] = by_group(predictions, labels, groups)
        metrics["worst_group"] = min(metrics["by_group"].values())
        intervals["by_group"] = {g: of(torch.tensor([g == name for name in groups]))[1] for g in metrics["by_group"]}
    return {**metrics, "intervals": intervals}


def most_confused(matrix: Tensor, limit: int = 5) -> list[tuple[int, int, int]]:
    """List `(label, prediction, rows)` of the most frequent errors in a confusion matrix, most frequent first."""
    wrong = matrix.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:limit].tolist()
    pairs = [(i // len(wrong), i % len(wrong), int(wrong.flatten()[i])) for i in order]
    return [pair for pair in pairs if pair[2]]


def oracle(logits: Sequence[Tensor], labels: Tensor) -> float:
    """Compute the accuracy of always picking a correct branch if there is one."""
    return float(torch.stack([z.argmax(-1) == labels for z in logits]).any(0).double().mean())


def bootstrap_counts(size: int, seed: int, draws: int) -> Iterator[Tensor]:
    """Yield blocks `[D, size]` float64 of how often each unit is drawn in each of `draws` bootstrap resamples."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, draws, CHUNK):
        drawn = torch.randint(size, (min(CHUNK, draws - start), size), generator=generator)
        yield torch.zeros(drawn.shape, dtype=torch.double).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))


def confidence_interval(values: Tensor) -> Interval:
    """Return the 2.5th and 97.5th percentiles of resampled values `[draws]`."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def bootstrap_interval(
    values: Tensor, seed: int = 0, draws: int = 1000, *, clusters: Tensor | None = None, classes: Tensor | None = None
) -> Interval:
    """Compute the 95 % percentile bootstrap confidence interval of a mean.

    For the difference between two models, pass the differences per row. If all values are equal the interval has zero width,
    however few rows there are, so report N with it.

    Args:
        values: `[N]`, one per row, e.g. 1 where the prediction is correct.
        seed: random seed.
        draws: number of resamples.
        clusters: `[N]` integers; rows with the same number (e.g. objects of one image) are drawn together.
        classes: `[N]` integers; the interval is that of the mean over classes of the means within a class (macro accuracy).

    Raises:
        L2R2Error: when there are no rows.
    """
    count = len(values)
    if count == 0:
        raise L2R2Error("A confidence interval needs at least one row.")
    member = torch.arange(count) if clusters is None else clusters.unique(return_inverse=True)[1]
    kind = torch.zeros(count, dtype=torch.long) if classes is None else classes.unique(return_inverse=True)[1]
    kinds, size = int(kind.max()) + 1, int(member.max()) + 1
    means = []
    for times in bootstrap_counts(size, seed, draws):
        weights = times[:, member]
        total = weights.new_zeros(len(times), kinds).index_add_(1, kind, weights * values.double())
        rows = weights.new_zeros(len(times), kinds).index_add_(1, kind, weights)
        means.append((total / rows).nanmean(1))  # a class that was not drawn does not count
    return confidence_interval(torch.cat(means))


def reliability_bins(logits: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a reliability diagram with the bins of `expected_calibration_error`.

    Returns:
        `[bins]` each: rows, mean confidence, accuracy (both 0 in an empty bin).
    """
    sure, answer = logits.double().softmax(-1).max(-1)
    place = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    rows = torch.zeros(bins, dtype=torch.double).index_add(0, place, torch.ones_like(sure))
    confidence, right = (torch.zeros_like(rows).index_add(0, place, v) for v in (sure, (answer == labels).double()))
    return rows.long(), confidence / rows.clamp(min=1), right / rows.clamp(min=1)


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count rows `[classes, classes]` int64 by label (row) and prediction (column); both inputs are `[N]`.

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return torch.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)

"""Warnings and notes on an evaluation, in sentences: what makes its metrics too optimistic, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..data.table import ImageTable
from .fit_run import trained_on, warnings_of
from .logits import BranchLogits


def intervened(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Describe the interventions on the network."""
    done = checkpoint.model.interventions()
    what = [f"without the parts {', '.join(map(str, done['drop_parts']))}"] if "drop_parts" in done else []
    what += [f"without patches below the quantile {done['token_quantile']:g}"] if "token_quantile" in done else []
    return (f"These metrics are of the network {' and '.join(what)}.",) if what else ()


def warnings_on(sources: Sequence[Path | str], judged: BranchLogits, split: str) -> tuple[str, ...]:
    """Warn of rows that a run was trained or fitted on, of missing boxes, and of boxes found with the true labels."""
    found = list(warnings_of(sources[0], judged.table, split, "do not carry over to new images"))
    for other in sources[1:]:
        found += [f"{other}: {w}" for w in warnings_of(other, judged.table, split, "do not carry over to new images")]
    if judged.table.boxes_from.get("oracle"):
        found.append("the boxes were found with each image's true label as prompt, which new images lack; for analysis only.")
    if not judged.has_fg.any() and "fg" in judged.logits:
        found.append(f"no object was found in any image of {split}; pass --boxes FILE if the boxes are in a file.")
    return tuple(found)


def fitted_on_seen(sources: Sequence[Path | str], rows: ImageTable, split: str) -> tuple[str, ...]:
    """Warn of rows to fit on that a run was trained on; with `--val-fraction`, seeds hold out different rows."""
    found = []
    for source in sources:
        if seen := trained_on(source, rows, split):
            found.append(f"{source}: {seen}; a fusion fitted on them will overrate this run.")
    return tuple(found)


def left_out(data: BranchLogits, split: str | None) -> tuple[str, ...]:
    """Count the images that cannot be used."""
    if not data.bad:
        return ()
    names = ", ".join(path.name for path in list(data.bad)[:3])
    return (f"{len(data.bad)} of {len(data) + len(data.bad)} images of {split} cannot be used and are left out, e.g. {names}.",)


def classes_seen(data: BranchLogits, labels: Sequence[str], split: str) -> tuple[str, ...]:
    """Name the classes that do not occur in a split."""
    occurring = set(data.labels.tolist())
    absent = [label for i, label in enumerate(labels) if i not in occurring]
    if len(occurring) == 1:
        only = labels[occurring.pop()]
        return (f"All images of {split} show {only}: the accuracy is the recall of this class.",)
    if not absent:
        return ()
    names = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
    return (f"{len(absent)} of {len(labels)} classes do not occur in {split} ({names}); the macro accuracy leaves them out.",)

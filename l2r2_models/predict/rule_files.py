"""Read the classes, regions and groups that restrict or roll up predictions, and check their names."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import L2R2Error
from ..fusion.prior_file import read_prior
from ..io import check_readable, file_sha256
from ..models.cascade import Cascade
from .inputs import Inputs
from .rules import ImagePrior, Rules


def read_rules(
    labels: Sequence[str],
    *,
    classes: str | None = None,
    geofence: Path | None = None,
    region: str | None = None,
    taxonomy: Path | None = None,
    rollup: float | None = None,
    abstain: float | None = None,
) -> Rules:
    """Make the rules for predictions.

    Args:
        labels: class names of the model.
        classes: comma-separated names of the possible classes, or a text file with one name per line.
        geofence: CSV with the columns `class` and `region`, one row per pair; a class without a row occurs everywhere.
        region: only classes that occur in this region are possible.
        taxonomy: CSV with one row per class: the class, then its groups from narrow to broad.
        rollup: see `Rules`; needs `taxonomy`.
        abstain: see `Rules` and `threshold_for`.

    Raises:
        L2R2Error: when a file cannot be read, a name is unknown, no class is left, or only one of two options is given that need
            each other.
    """
    if (geofence is None) != (region is None):
        raise L2R2Error("--geofence FILE and --region NAME need each other; pass both.")
    if (taxonomy is None) != (rollup is None):
        raise L2R2Error("--taxonomy FILE and --rollup PROBABILITY need each other; pass both.")
    if rollup is not None and not 0 < rollup <= 1:
        raise L2R2Error(f"--rollup is a probability above 0, up to 1; got {rollup:g}.")
    if rollup is not None and abstain is not None:
        raise L2R2Error("--rollup names a group where --abstain withholds the class; use one or the other.")
    kept = None if classes is None else _named_classes(classes, labels)
    if geofence is not None and region is not None:
        here = _of_region(geofence, region, labels)
        kept = here if kept is None else kept & here
    if kept is not None and not kept:
        raise L2R2Error("No class of the model is left by --classes and --region; predictions need at least one.")
    ancestors = {} if taxonomy is None else _taxonomy(taxonomy, labels)
    return Rules(tuple(labels), None if kept is None else tuple(c for c in labels if c in kept), ancestors, rollup, abstain)


def rules_for(checkpoint: Checkpoint, *, abstain: float | None = None, **options: Any) -> Rules:
    """Make the rules for predictions of a checkpoint.

    Args:
        checkpoint: gives the class names.
        abstain: error rate of the predictions that are not withheld, see `threshold_for`.
        options: see `read_rules`.

    Raises:
        L2R2Error: as `read_rules` and `threshold_for` do.
    """
    threshold = None if abstain is None else threshold_for(checkpoint, abstain)
    return read_rules(checkpoint.labels, abstain=threshold, **options)


def threshold_for(checkpoint: Checkpoint, risk: float) -> float:
    """Return the confidence threshold that `l2r2 fuse --abstain-risk` stored in a checkpoint.

    Raises:
        L2R2Error: when it stored none for this risk.
    """
    stored = checkpoint.training.get("fusion_fit", {}).get("abstain", {})
    if stored.get("risk") != risk:
        has = f"has a threshold for a risk of {stored['risk']:g} only" if stored else "has no threshold to abstain"
        raise L2R2Error(f"{checkpoint.name}: {has}; run `l2r2 fuse RUN DATA --abstain-risk {risk:g}` on held-out rows first.")
    threshold: float = stored["threshold"]
    return threshold


def cascade_of(checkpoint: Checkpoint, loss: float | None) -> Cascade | None:
    """Return the cascade for a loss of accuracy in percentage points: 0 for an exact one, None for none.

    Raises:
        L2R2Error: when the loss is no number, or `l2r2 fuse --cascade` stored no threshold for it.
    """
    if loss is None:
        return None
    if isinstance(loss, bool) or not isinstance(loss, (int, float)) or not 0 <= loss < 100:
        raise L2R2Error(f"cascade is the accuracy that may be lost, in percentage points (0 for none), got {loss}.")
    if loss == 0:
        return Cascade(0.0)
    stored = checkpoint.training.get("fusion_fit", {}).get("cascade", {})
    if stored.get("loss") != loss:
        has = f"has a cascade for a loss of {stored['loss']:g} points only" if stored else "has no fitted cascade"
        raise L2R2Error(
            f"{checkpoint.name}: {has}; run `l2r2 fuse RUN DATA --cascade {loss:g}` on held-out rows first, or use --cascade 0."
        )
    return Cascade(float(loss), float(stored["threshold"]))


def _named_classes(text: str, labels: Sequence[str]) -> set[str]:
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a long list of names is no file name
        is_file = False
    names = [row[0] for row in _rows(path, whole=True)] if is_file else text.split(",")
    found = [name.strip() for name in names if name.strip()]
    _check_names(found, labels, "class", str(path) if is_file else "--classes")
    return set(found)


def _of_region(path: Path, region: str, labels: Sequence[str]) -> set[str]:
    header, *rows = _rows(path)
    columns = [name.strip().lower() for name in header]
    if not {"class", "region"} <= set(columns):
        raise L2R2Error(f"{path}: has the columns {', '.join(header)}; a geofence needs the columns class and region.")
    at = columns.index("class"), columns.index("region")
    if short := next((i for i, row in enumerate(rows, 2) if len(row) <= max(at)), None):
        raise L2R2Error(f"{path}: row {short} is too short; each row needs a class and a region.")
    pairs = [(row[at[0]].strip(), row[at[1]].strip()) for row in rows]
    _check_names((name for name, _ in pairs), labels, "class", str(path))
    _check_names([region], sorted({place for _, place in pairs}), "region", str(path))
    listed = {name for name, _ in pairs}
    return {name for name, place in pairs if place == region} | (set(labels) - listed)


def _taxonomy(path: Path, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    header, *rows = _rows(path)
    if len(header) < 2:
        raise L2R2Error(f"{path}: has one column; a taxonomy needs the class and its groups, e.g. class,genus,family.")
    found: dict[str, tuple[str, ...]] = {}
    for name, *groups in ([cell.strip() for cell in row] for row in rows):
        if name in found:
            raise L2R2Error(f"{path}: has two rows for {name}; remove one.")
        found[name] = tuple(groups[: len(header) - 1])
    if lacking := [label for label in labels if label not in found]:
        _check_names(lacking[:1], list(found), "row", str(path))
    return {label: found[label] for label in labels}


def _check_names(names: Iterable[str], known: Sequence[str], what: str, source: str) -> None:
    """Check that all names are known.

    Raises:
        L2R2Error: when one is not; the message suggests the most similar one.
    """
    if unknown := next((name for name in names if name not in set(known)), None):
        similar = difflib.get_close_matches(unknown, known, 1, cutoff=0.5)
        hint = f"did you mean {similar[0]}?" if similar else f"there are {len(known)}, e.g. {', '.join(known[:3])}."
        lead = f"has no row for the class {unknown}" if what == "row" else f'unknown {what} "{unknown}"'
        raise L2R2Error(f"{source}: {lead}; {hint}")


def _rows(path: Path, whole: bool = False) -> list[list[str]]:
    """Return the rows of a CSV file that are not empty; with `whole`, each line is one cell."""
    check_readable(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[line.strip()] for line in file] if whole else list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise L2R2Error(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    if not (found := [row for row in rows if any(cell.strip() for cell in row)]):
        raise L2R2Error(f"{path}: is empty.")
    return found


def with_prior(rules: Rules, file: Path, inputs: Inputs) -> Rules:
    """Return the rules with a metadata prior for the images to predict.

    Args:
        rules: the other rules.
        file: a file of `l2r2 prior fit`.
        inputs: the images, with their metadata.

    Raises:
        L2R2Error: when the file is not a prior for these classes, or no image has one of its columns.
    """
    prior = read_prior(file, rules.labels)
    if not any(any(prior.values_of(row)) for row in inputs.columns.values()):
        names = ", ".join(column.name for column in prior.columns)
        raise L2R2Error(f"{file}: no image has a value of {names}; predict a data set with these columns, or pass --metadata.")
    return replace(rules, prior=ImagePrior(prior, inputs.columns, file_sha256(file)))

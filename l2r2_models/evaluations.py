"""Evaluations that a run keeps: `evaluations/SPLIT.json`, as `l2r2 evaluate --json` prints them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import L2R2Error
from .io import read_json, write_json

EVALUATIONS = "evaluations"


def store_evaluation(run: str | Path, data: str | Path, digest: str, evaluation: dict[str, Any]) -> Path:
    """Keep an evaluation in the run's folder; a later one of the same data set and split replaces it.

    Args:
        run: the run's folder.
        data: the data set's folder, whose name is kept and not its path.
        digest: SHA-256 of the weights that were judged.
        evaluation: `Evaluation.to_dict()`.
    """
    name = Path(data).resolve().name
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{name}.{evaluation['split']}")
    file = Path(run) / EVALUATIONS / f"{safe}.json"
    write_json(file, {"data": name, "weights": digest, **evaluation})
    return file


def read_evaluations(run: str | Path, more: Iterable[str | Path] = (), digest: str | None = None) -> tuple[dict[str, Any], ...]:
    """The run's evaluations and those of other files.

    Args:
        run: the run's folder.
        more: files that `l2r2 evaluate --json` printed.
        digest: SHA-256 of the weights; a kept evaluation of other weights (from before `l2r2 fuse`, or of an overwritten run) is
            left out.

    Raises:
        L2R2Error: a file is not an evaluation; the message names it.
    """
    kept = [_check(read_json(file), file) for file in sorted((Path(run) / EVALUATIONS).glob("*.json"))]
    own = [e for e in kept if digest is None or e.get("weights", digest) == digest]
    return (*own, *(_check(read_json(file), Path(file)) for file in more))


def _check(data: Any, file: Path) -> dict[str, Any]:
    rows: Any = data.get("rows") if isinstance(data, dict) else None
    fits = isinstance(rows, dict) and rows and isinstance(data.get("split"), str) and isinstance(data.get("images"), int)
    if not fits:
        raise L2R2Error(f"{file}: is not what `l2r2 evaluate --json` prints.")
    for name, row in rows.items():
        accuracy = row.get("accuracy") if isinstance(row, dict) else None
        if isinstance(accuracy, bool) or not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
            raise L2R2Error(f"{file}: the row {name} has no accuracy from 0 to 1.")
    return data

"""Files of metadata priors, as `l2r2 prior fit` writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import read_json, write_json
from .prior import MetadataPrior, PriorColumn

VERSION = "1"


def write_prior(file: Path, prior: MetadataPrior, about: Mapping[str, Any]) -> None:
    """Write a prior as JSON.

    Args:
        file: file to write.
        prior: the prior.
        about: how it was fitted, for the reader.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    rows = [{"values": list(values), "counts": counts} for values, counts in sorted(prior.cells.items())]
    settings = {"columns": list(map(str, prior.columns)), "joint": prior.joint, "smoothing": prior.smoothing}
    write_json(file, {"prior_version": VERSION, **settings, "labels": list(prior.labels), "fitted": dict(about), "rows": rows})


def read_prior(file: Path, labels: Sequence[str]) -> MetadataPrior:
    """Read a prior for the classes of a model.

    Args:
        file: a file written by `write_prior`.
        labels: class names of the model, in the order of the logits.

    Raises:
        L2R2Error: when it is not such a file, or has a class that the model does not have.
    """
    data = read_json(file)
    try:
        if data["prior_version"] != VERSION:
            raise L2R2Error(f"{file}: was written by another version; fit the prior again with `l2r2 prior fit`.")
        columns = [PriorColumn.parse(text) for text in data["columns"]]
        cells = {tuple(map(str, row["values"])): {str(k): float(n) for k, n in row["counts"].items()} for row in data["rows"]}
        if any(len(values) != len(columns) or min(counts.values()) < 0 for values, counts in cells.items()):
            raise ValueError
        smoothing, joint = float(data["smoothing"]), bool(data["joint"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise L2R2Error(f"{file}: is not a metadata prior; write one with `l2r2 prior fit`.") from error
    try:
        return MetadataPrior(labels, columns, cells, smoothing=smoothing, joint=joint)
    except L2R2Error as error:
        raise L2R2Error(f"{file}: {re.sub('^The metadata prior', 'it', str(error))}") from error

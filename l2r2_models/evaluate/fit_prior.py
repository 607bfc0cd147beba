"""Fit a metadata prior on the labels and metadata of a data set, as `l2r2 prior fit` does; no image is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.table import ImageTable, read_table
from ..errors import L2R2Error
from ..fusion import MetadataPrior, PriorColumn
from ..fusion.prior import candidates
from ..fusion.prior_file import write_prior


def fit_prior(
    data: Path,
    columns: Sequence[str],
    out: Path,
    *,
    split: str | None = None,
    val_split: str | None = None,
    metadata: Path | None = None,
) -> tuple[MetadataPrior, dict[tuple[bool, float], float]]:
    """Count how often each class occurs with each value, and write the prior.

    Args:
        data, metadata: see `read_table`.
        columns: metadata columns, see `PriorColumn.parse`.
        out: file to write.
        split: split to count; defaults to `train`, or to all images if there are no splits.
        val_split: split on whose labels the smoothing, and whether columns are combined, are chosen (by the likelihood of the
            labels given the metadata); defaults to `val` if there is one. Without it, columns are independent and the smoothing
            is 1.

    Returns:
        The prior, and the mean log-likelihood on `val_split` by candidate (joint, smoothing); empty without it.

    Raises:
        L2R2Error: when a column is missing, a split is empty, both splits are the same, or a label is missing.
    """
    table = read_table(data, metadata=metadata)
    split = split or ("train" if table.splits else None)
    val_split = val_split or ("val" if "val" in table.splits and split != "val" else None)
    if split is not None and split == val_split:
        raise L2R2Error(f"The split {split} cannot be used both to count and to choose; choose another split to choose on.")
    rows = table if split is None else table.of_split(split)
    labels = rows.classes()
    truth, values = _read(rows, columns)
    held_out = _read(table.of_split(val_split), columns) if val_split else None
    found: dict[tuple[bool, float], float] = {}
    settings = next(candidates(columns))
    if held_out is not None:
        for joint, smoothing in candidates(columns):
            prior = MetadataPrior.of_rows(labels, truth, values, columns, smoothing=smoothing, joint=joint)
            found[joint, smoothing] = prior.log_likelihood(*held_out)
        settings = max(found, key=lambda candidate: found[candidate])  # ties go to the first, the simplest
    prior = MetadataPrior.of_rows(labels, truth, values, columns, smoothing=settings[1], joint=settings[0])
    write_prior(out, prior, {"rows": len(rows), "split": split, "chosen_on": val_split})
    return prior, found


def _read(rows: ImageTable, columns: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the class and the metadata of each row; a column that no row has is an error."""
    found = [dict(row.columns) for row in rows.rows]
    for column in map(PriorColumn.parse, columns):
        if not any(column.name in values for values in found):
            rows.column(column.name)  # raises, and names the columns that there are
    return [str(row.label) for row in rows.rows], found

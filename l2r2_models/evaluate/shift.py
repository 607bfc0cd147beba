"""Fraction of misleading backgrounds in a split, and fusion adapted to it."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..errors import L2R2Error
from ..fusion import Adapted, Grouping, fuse_groups
from .logits import BranchLogits


def can_fuse(data: BranchLogits) -> bool:
    """Return whether there are at least two branches to fuse."""
    return len(data.logits) > 1


def adapt_run(checkpoint: Checkpoint, data: BranchLogits, grouping: Grouping | None, group: str | None, split: str) -> Adapted:
    """Fuse the branch logits of a run by group (see `fuse_groups`).

    Args:
        grouping: how images are grouped; if None, by the column `group`, else the whole split is one group.

    Raises:
        L2R2Error: when the model has one branch, its fusion has no batch rule, or the column is unknown.
    """
    fusion, rows = checkpoint.model.fusion, data.table.rows
    if grouping is None and (fusion.batch is None or not can_fuse(data)):
        return Adapted(data.labels, {})
    if grouping is not None:
        groups = grouping.of([row.path for row in rows], [dict(row.columns) for row in rows])
    else:
        groups = data.table.column(group) if group else [split] * len(rows)
    if not can_fuse(data):
        raise L2R2Error(f"{checkpoint.name}: the model has one branch, so there is nothing to fuse by group.")
    return fuse_groups(fusion, data.logits, data.has_fg, groups, data.objectness)

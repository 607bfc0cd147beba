"""How far the images of a split are from home: the share of misleading backgrounds, and the fusion that knows it."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..errors import L2R2Error
from ..fusion import Adapted, Grouping, fuse_groups
from .logits import BranchLogits


def can_fuse(data: BranchLogits) -> bool:
    """Whether there are two branches to fuse."""
    return len(data.logits) > 1


def adapt_run(checkpoint: Checkpoint, data: BranchLogits, grouping: Grouping | None, group: str | None, split: str) -> Adapted:
    """A run's fusion that knows which images are of one place.

    Args:
        grouping: how they are grouped; None: by the column `group`, or the whole split, to see what backgrounds are like.

    Raises:
        L2R2Error: a grouping for a model of one branch, or whose fusion has no batch rule; or an unknown column.
    """
    fusion, rows = checkpoint.model.fusion, data.table.rows
    if grouping is None and (fusion.batch is None or not can_fuse(data)):
        return Adapted(data.labels, {})
    if grouping is not None:
        groups = grouping.of([row.path for row in rows], [dict(row.columns) for row in rows])
    else:
        groups = data.table.column(group) if group else [split] * len(rows)
    if not can_fuse(data):
        raise L2R2Error(f"{checkpoint.name}: has one branch, so there is nothing to fuse by group.")
    return fuse_groups(fusion, data.logits, data.has_fg, groups, data.objectness)

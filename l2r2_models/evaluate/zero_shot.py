"""What the evaluation of a zero-shot model adds: every view, the center crop, and debiasing by the background.

Source: L2R2 5.2, Table 5; see `docs/method.md`, section 10.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..boxes import BoxEntry
from ..checkpoints.checkpoint import Checkpoint
from ..data.table import ImageTable
from ..zero_shot.model import ZeroShotNetwork
from .backgrounds import default_backgrounds, logits_to_fit
from .logits import BranchLogits, Compute, Progress, branch_logits
from .metrics import macro_accuracy

CENTER = BoxEntry(((0.25, 0.25, 0.75, 0.75),), (1.0,), ("",), normalized=True)  # as the localizer `center`
STRENGTHS = tuple(i / 10 for i in range(11))


def with_every_branch(checkpoint: Checkpoint) -> Checkpoint:
    """Return a zero-shot checkpoint with full, fg and bg; any other checkpoint as it is."""
    if not isinstance(checkpoint.model, ZeroShotNetwork):
        return checkpoint
    return replace(checkpoint, model=checkpoint.model.with_branches(("full", "fg", "bg")))


def zero_shot_outputs(
    checkpoint: Checkpoint, data: BranchLogits, strength: float | None, workers: int | None, progress: Progress, compute: Compute
) -> dict[str, Tensor]:
    """Return logits `[N, classes]` of the baselines of a zero-shot model; none for any other model.

    Args:
        checkpoint: the model, see `with_every_branch`.
        data: its branch logits.
        strength: see `strength_on_swapped`; None leaves out the debiased output.
        workers, progress, compute: see `branch_logits`.
    """
    if not isinstance(checkpoint.model, ZeroShotNetwork):
        return {}
    centered = tuple(replace(row, entry=CENTER, mask_file=None) for row in data.table.rows)
    fg = replace(checkpoint, model=checkpoint.model.with_branches(("fg",)))
    cropped = branch_logits(fg, replace(data.table, rows=centered), workers=workers, progress=progress, compute=compute)
    found = {"center crop": cropped.logits["fg"]}
    if strength is not None:
        found[f"full - {strength:g} bg"] = debiased(data, strength)
    return found


def debiased(data: BranchLogits, strength: float) -> Tensor:
    """Subtract the log-probabilities of bg, times the strength, from those of full; without an object, full is unchanged."""
    full, bg = (data.logits[b].log_softmax(-1) for b in ("full", "bg"))
    return torch.where(data.has_fg[:, None], full - strength * bg, full)


def strength_on_swapped(
    checkpoint: Checkpoint, rows: ImageTable, donors: ImageTable, skip_bad: bool, progress: Progress
) -> float | None:
    """Choose the strength of `debiased` by the macro accuracy on held-out objects on other backgrounds.

    Args:
        checkpoint: the model, see `with_every_branch`.
        rows: the held-out rows.
        donors: the rows whose backgrounds are used.
        skip_bad, progress: see `branch_logits`.

    Returns:
        The smallest of the best strengths; None if the model is not zero-shot, or there are too few objects or backgrounds.
    """
    plain = default_backgrounds(rows, donors, checkpoint.box_threshold) == "plain"
    if plain or not isinstance(checkpoint.model, ZeroShotNetwork):
        return None
    swapped = logits_to_fit(checkpoint, rows, donors, "swapped", skip_bad=skip_bad, progress=progress)
    return max(STRENGTHS, key=lambda strength: macro_accuracy(debiased(swapped, strength).argmax(-1), swapped.labels))

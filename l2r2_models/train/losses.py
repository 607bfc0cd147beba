"""What is minimised: the losses of the branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model import L2R2


class BranchLoss(nn.Module):
    """A model with its training loss: the sum of the branches' cross-entropies (METHOD.md 3).

    Rows without a box count for the full branch only; their fg view is the whole image.
    """

    def __init__(self, model: L2R2, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(
        self,
        labels: Tensor,
        has_fg: Tensor,
        full: Tensor | None = None,
        fg: Tensor | None = None,
        bg: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Views `[B, C, S, S]`, labels `[B]` -> loss, and the logits `[B, classes]` by branch and fused.

        For figures, rows without a box have the full branch's logits in every branch, as a Prediction has.
        """
        logits = self.model.forward_branches(full=full, fg=fg, bg=bg)
        rows = {branch: torch.ones_like(has_fg) if branch == "full" else has_fg for branch in logits}
        losses = [self._loss(z, labels, rows[branch]) for branch, z in logits.items()]
        fused = self.model.fuse(logits, has_fg)
        if "full" in logits:
            logits = {branch: torch.where(rows[branch][:, None], z, logits["full"]) for branch, z in logits.items()}
        return {"loss": torch.stack(losses).sum(), "fused": fused, **logits}

    def _loss(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (each * rows).sum() / rows.sum().clamp(min=1)

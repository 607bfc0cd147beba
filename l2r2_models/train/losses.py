"""The training loss: the sum of the branches' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..fusion import with_fallback
from ..models.box_head import box_losses
from ..models.l2r2 import L2R2
from ..models.mask_head import mask_losses
from ..models.parts import PartWeights
from ..views import BRANCHES
from .consistency import jensen_shannon
from .groups import GroupDRO
from .mixup import ViewMixup


class BranchLoss(nn.Module):
    """A model with its training loss, the sum of the branches' cross-entropies (`docs/method.md`, section 3).

    Rows without an object count for the full branch only.

    Args:
        model: the model to train.
        label_smoothing: see `torch.nn.functional.cross_entropy`.
        mix: mixup or cutmix of the views in training.
        frozen: parts of the model that are not trained, see `frozen_parts`; their batch-norm statistics stay as they are.
        channels_last: memory layout of weights and views.
        part_weights: weights of the losses on the parts of an iFAM model.
        dro: replaces the mean over the rows by that over weighted groups, in training.
        consistency: weight of the Jensen-Shannon divergence between the predictions for a view and for the same object on another
            background, in training.
    """

    def __init__(
        self,
        model: L2R2,
        label_smoothing: float = 0.0,
        *,
        mix: ViewMixup | None = None,
        frozen: Sequence[nn.Module] = (),
        channels_last: bool = False,
        part_weights: PartWeights | None = None,
        dro: GroupDRO | None = None,
        consistency: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.label_smoothing, self.mix, self.dro = label_smoothing, mix, dro
        self.consistency = consistency
        self.part_weights = part_weights or PartWeights()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._frozen = tuple(frozen)  # a tuple, so that the state dict does not contain them twice
        for part in self._frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> BranchLoss:
        """Set training or evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(
        self,
        labels: Tensor,
        has_fg: Tensor,
        full: Tensor | None = None,
        fg: Tensor | None = None,
        bg: Tensor | None = None,
        mask: Tensor | None = None,
        box: Tensor | None = None,
        localized: Tensor | None = None,
        object_mask: Tensor | None = None,
        has_mask: Tensor | None = None,
        group: Tensor | None = None,
        counts: Tensor | None = None,
        swapped: Tensor | None = None,
        swapped_full: Tensor | None = None,
        swapped_fg: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss and the logits.

        Args:
            labels: `[B]` class indices.
            has_fg: `[B]` bool, whether an object was found.
            full, fg, bg: `[B, C, S, S]` views of the branches, see `L2R2.forward_views`.
            mask: see `L2R2.forward_views`.
            box: `[B, 4]` target of the model's box head, see `ViewDataset`; its loss is added, see `box_losses`.
            localized: `[B]` bool, False for rows where the localizer failed or was not run; the objectness loss ignores them.
            object_mask: `[B, S, S]` target of the model's mask head, see `ViewDataset`; its loss is added, see `mask_losses`.
            has_mask: `[B]` bool, False for rows whose mask is not known; the mask loss ignores them.
            group: `[B]` group indices, for `dro`.
            counts: `[2]`, the number of rows and of rows with an object in the whole batch, by which sums are divided if this is
                a part of a batch; None uses the counts of this batch.
            swapped: `[B]` bool, the rows whose views on another background count for `consistency`.
            swapped_full, swapped_fg: `[B, C, S, S]` views of the objects on other backgrounds.

        Returns:
            `loss`, and logits `[B, classes]`: `fused`, and one entry per branch. Rows without an object have the logits of the
            full branch in every branch, as in a `Prediction`.
        """
        views = self._given(full=full, fg=fg, bg=bg)
        rows = {branch: torch.ones_like(has_fg) if branch == "full" else has_fg for branch in BRANCHES}
        targets = dict.fromkeys(BRANCHES, labels)
        if self.training and self.mix is not None:
            for branch in views:
                views[branch], targets[branch] = self.mix(views[branch], labels, rows[branch])
        out = self.model.forward_views(**views, has_fg=has_fg, mask=mask)
        rows.update(fg=out.has_fg, bg=out.has_fg)  # excludes rows whose mask keeps no patch
        logits = {branch: z.float() for branch, z in out.branches().items()}  # float32 under autocast too
        losses = []
        for branch, z in logits.items():
            each = nn.functional.cross_entropy(z, targets[branch], reduction="none", label_smoothing=self.label_smoothing)
            if self.training and self.dro is not None:
                losses.append(self.dro(branch, each, rows[branch], group))
            else:
                losses.append((each * rows[branch]).sum() / _count(rows[branch], counts, 0 if branch == "full" else 1))
        if self.training and self.consistency and swapped is not None:
            again = self._given(full=swapped_full, fg=swapped_fg)
            for branch, z in self.model.forward_branches(**again).items() if again else ():
                each = jensen_shannon(logits[branch], z.float())
                losses.append(self.consistency * (each * (swapped & has_fg)).sum() / _count(has_fg, counts, 1))
        if box is not None and out.located is not None:
            of_box, of_object = box_losses(out.located, box)
            if localized is not None:
                of_object = of_object * localized
            losses += [of_box.sum() / _count(has_fg, counts, 1), of_object.sum() / _count(torch.ones_like(has_fg), counts, 0)]
        if object_mask is not None and has_mask is not None and out.masks is not None:
            each = mask_losses(out.masks, object_mask)
            losses.append((each * has_mask).sum() / _count(torch.ones_like(has_fg), counts, 0))
        if self.training:
            part_of_batch = 1 if counts is None else len(labels) / counts[0]
            losses += [term * part_of_batch for term in self.model.extra_losses(out, views, self.part_weights).values()]
        return {"loss": torch.stack(losses).sum(), "fused": out.fused.float(), **with_fallback(logits, out.has_fg)}

    def _given(self, **views: Tensor | None) -> dict[str, Tensor]:
        return {b: view.contiguous(memory_format=self.memory_format) for b, view in views.items() if view is not None}


def _count(rows: Tensor, counts: Tensor | None, which: int) -> Tensor:
    """Return the divisor of a sum over rows."""
    return rows.sum().clamp(min=1) if counts is None else counts[which]


def by_branch(inputs: Mapping[str, Tensor], branches: Sequence[str]) -> list[dict[str, Tensor]]:
    """Split the arguments of `BranchLoss` into those of each branch, whose losses add up to that of all branches.

    Args:
        inputs: the arguments by name.
        branches: the branches of the model, in order.
    """
    own = {*BRANCHES, "mask", *(f"swapped_{branch}" for branch in BRANCHES)}
    common = {name: value for name, value in inputs.items() if name not in own}
    parts = []
    for branch in branches:
        view = inputs[branch if branch in inputs else "full"]  # an fg that is masked in the network sees the full view
        others = [f"swapped_{branch}", *(["mask"] if branch == "fg" else [])]
        parts.append({**common, branch: view, **{name: inputs[name] for name in others if name in inputs}})
    return parts

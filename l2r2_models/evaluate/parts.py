"""Parts that an iFAM model finds, the patches that its second stage sees, and how well they match true masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..data.dataset import Sample, sample_of
from ..data.table import ImageTable
from ..errors import L2R2Error
from ..models.ifam import IFAM
from ..models.masking import coverage
from ..views import make_views
from .logits import Progress

BATCH = 32
AGREEMENT = ("iou", "iou_of_everything", "object_kept", "background_kept")


@dataclass(frozen=True)
class FoundParts:
    """Output of stage 1 for N images on a grid of h x w patches.

    Attributes:
        rows: row indices of the images in the table.
        views: `[N, 3, S, S]` uint8, the whole images as the network receives them.
        part: `[N, h, w]` int64, the part that each patch belongs to; K is the background.
        keep: `[N, h, w]` bool, the patches that stage 2 sees (fewer than the parts have, under an intervention).
        true: `[N, h, w]` bool, the patches of which at least half is inside the true mask.
        has_mask: `[N]` bool, whether there is a non-empty true mask.
        num_parts: K.
    """

    rows: list[int]
    views: Tensor
    part: Tensor
    keep: Tensor
    true: Tensor
    has_mask: Tensor
    num_parts: int

    def shares(self) -> list[float]:
        """Return the fraction of all patches per part, the background last."""
        return torch.bincount(self.part.flatten(), minlength=self.num_parts + 1).div(max(self.part.numel(), 1)).tolist()

    def occurrence(self) -> list[float]:
        """Return the fraction of images that have a patch of each part, the background last."""
        return [(self.part == k).any((1, 2)).float().mean().item() for k in range(self.num_parts + 1)]

    def agreement(self) -> dict[str, float]:
        """Compute the agreement with the true masks, averaged over the images that have one; empty if none has.

        Returns:
            `iou` of the kept patches and those under the mask; `iou_of_everything`, the IoU if all patches were kept;
            `object_kept` and `background_kept`, the fraction of the patches under the mask, and of the others, that is kept.
            All are in [0, 1].
        """
        if not self.has_mask.any():
            return {}
        keep, true = (x[self.has_mask].flatten(1) for x in (self.keep, self.true))

        def share(of: Tensor, among: Tensor) -> Tensor:
            """Return the fraction of `among` that is in `of`; NaN if `among` is empty."""
            return (of & among).sum(1) / among.sum(1)

        values = torch.stack([share(keep & true, keep | true), true.float().mean(1), share(keep, true), share(keep, ~true)])
        return dict(zip(AGREEMENT, values.nanmean(1).tolist()))


@torch.inference_mode()
def find_parts(
    checkpoint: Checkpoint,
    table: ImageTable,
    most: int | None = None,
    progress: Progress = lambda batches, _: batches,
) -> FoundParts:
    """Run stage 1 on images, under the interventions that the model has.

    Args:
        checkpoint: checkpoint of an iFAM model.
        table: images; those that cannot be read are left out. Masks from a localizer are not used as ground truth.
        most: maximum number of images, evenly spaced in the table; None for all.
        progress: wraps the batches.

    Raises:
        L2R2Error: when the model is not an iFAM model, or no image can be read.
    """
    if not checkpoint.model.finds_object:
        raise L2R2Error(f"{checkpoint.name}: this model does not find parts; use an iFAM model.")
    model = cast(IFAM, checkpoint.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    count = len(table) if most is None else min(most, len(table))
    chosen = [i * len(table) // count for i in range(count)]
    rows: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    batches = [chosen[start : start + BATCH] for start in range(0, count, BATCH)]
    for batch in progress(batches, len(batches)):
        samples: dict[int, Sample] = {}
        for i in batch:
            try:
                samples[i] = sample_of(table.rows[i], model.view_spec.fill, checkpoint.box_threshold)
            except L2R2Error:
                continue
        if samples:
            rows += samples
            found.append(_of_batch(model, list(samples.values()), not table.boxes_from.get("localizer"), device))
    model.cpu()
    if not rows:
        raise L2R2Error(f"{table.root}: none of its {count} images can be read.")
    views, part, keep, true, has_mask = (torch.cat(tensors) for tensors in zip(*found))
    return FoundParts(rows, views, part, keep, true, has_mask, model.parts.num_parts)


@torch.inference_mode()
def parts_of(model: IFAM, pixels: Tensor) -> FoundParts:
    """Run stage 1 on one image, uint8 `[H, W, 3]`, under the interventions that the model has."""
    sample = Sample(pixels, torch.full((4,), torch.nan), None)
    views, part, keep, true, has_mask = _of_batch(model, [sample], False, next(model.parameters()).device)
    return FoundParts([0], views, part, keep, true, has_mask, model.parts.num_parts)


def _of_batch(model: IFAM, samples: list[Sample], are_true: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Compute the tensors of `FoundParts` for one batch."""
    spec = replace(model.view_spec, fg_mode="tokens")  # views of this mode include the object mask
    masks = [sample.mask if are_true else None for sample in samples]
    whole = torch.tensor([[0.0, 0, sample.pixels.shape[1], sample.pixels.shape[0]] for sample in samples])
    views = make_views([sample.pixels for sample in samples], whole, spec, masks=masks)
    assert views.full is not None and views.mask is not None
    parts = model.find_parts(views.full.to(device))
    true = coverage(views.mask.float(), (parts.keep.shape[1], parts.keep.shape[2])) >= 0.5
    has_mask = views.has_fg & torch.tensor([mask is not None for mask in masks])
    return spec.to_uint8(views.full), parts.logits.argmax(1).cpu(), parts.keep.cpu(), true, has_mask

"""Localizing without knowing the class: the full branch's best classes are the prompts (METHOD.md 6 `topk_prompts`, L2R2's
"No GT" on Hard ImageNet)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..models.l2r2 import L2R2
from ..views import make_views
from .base import Localizer
from .prompted import Prompted
from .segment import Masked


@dataclass(frozen=True)
class Candidates:
    """What was found for the k best classes of each of B images.

    Attributes:
        classes: `[B, k]` int64, the full branch's best first.
        scores: `[B, k]` mean of the class's logit in full, in fg on the crop found for it, and in bg where the model has it.
        boxes: `[B, k, 4]` pixels of the image, NaN where nothing was found: fg saw the whole image then.
        box_scores: `[B, k]`, the localizer's.
        branches: logits `[B, k, classes]` of fg (and bg), `[B, classes]` of full.
    """

    classes: Tensor
    scores: Tensor
    boxes: Tensor
    box_scores: Tensor
    branches: dict[str, Tensor]


def check_promptable(localizer: Localizer, model: L2R2) -> Prompted:
    """Raises:
    L2R2Error: the localizer takes no prompts, or the model lacks full or fg.
    """
    if isinstance(localizer, Masked) or not isinstance(localizer, Prompted):
        raise L2R2Error(f"top-k prompts need a localizer that is told what to look for, without masks; not {localizer.spec}.")
    if not {"full", "fg"} <= set(model.branches):
        raise L2R2Error(f"top-k prompts need the branches full and fg; this model has {', '.join(model.branches)}.")
    return localizer


@torch.inference_mode()
def topk_prompts(
    model: L2R2, labels: Sequence[str], localizer: Prompted, images: Sequence[Image], k: int, box_threshold: float = 0.0
) -> Candidates:
    """The candidates of each image; the one with the best score wins.

    Args:
        model: in eval mode.
        labels: of its classes; `_` is read as a space in the prompt.
        localizer: see `check_promptable`.
        images: upright RGB.
        k: how many classes are looked for, at most all.
        box_threshold: boxes with a lower score count as not found.
    """
    device, spec = next(model.parameters()).device, model.view_spec
    whole = make_views(images, None, spec, branches=("full",), device=device).full
    full = model.forward_branches(full=whole)["full"]
    classes = full.topk(min(k, len(labels))).indices  # [B, k]
    count = classes.shape[1]
    prompts = [[labels[c].replace("_", " ") for c in row] for row in classes.tolist()]
    found = [_best(d, box_threshold) for of_image in localizer.by_prompt(images, prompts) for d in of_image]
    boxes, box_scores = torch.stack([box for box, _ in found]), torch.tensor([score for _, score in found])
    others = [b for b in model.branches if b != "full"]
    index = torch.arange(len(images)).repeat_interleave(count)
    views = make_views(images, boxes, spec, branches=others, image_index=index, device=device)
    logits = model.forward_views(**views.inputs()).branches()
    branches = {b: z.unflatten(0, (-1, count)) for b, z in logits.items()}  # [B, k, classes]
    said = [full.gather(1, classes), *(z.gather(2, classes[..., None])[..., 0] for z in branches.values())]
    shape = (len(images), count)
    return Candidates(
        classes, torch.stack(said).mean(0), boxes.reshape(*shape, 4), box_scores.reshape(shape), {"full": full, **branches}
    )


def _best(found: Detections, threshold: float) -> tuple[Tensor, float]:
    sure = found.above(threshold).usable()
    return (sure.boxes[0], float(sure.scores[0])) if len(sure) else (torch.full((4,), float("nan")), 0.0)

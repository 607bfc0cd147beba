"""Localization without knowing the class, with the top-k classes of the full branch as prompts.

Source: L2R2 on Hard ImageNet without ground truth; formulas in `docs/method.md`, section 6, `topk_prompts`.
"""

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
    """One candidate for each of the top-k classes of B images.

    Attributes:
        classes: `[B, k]` int64, in the order in which the full branch ranks them.
        scores: `[B, k]` mean of the class's logits: full, fg on the crop found for the class, and bg if the model has it.
        boxes: `[B, k, 4]` xyxy pixels of the image; NaN if nothing was found, in which case fg sees the whole image.
        box_scores: `[B, k]` scores of the localizer; 0 if nothing was found.
        branches: logits by branch, `[B, k, classes]` for fg (and bg), `[B, classes]` for full.
    """

    classes: Tensor
    scores: Tensor
    boxes: Tensor
    box_scores: Tensor
    branches: dict[str, Tensor]


def check_promptable(localizer: Localizer, model: L2R2) -> Prompted:
    """Check that a localizer and a model can be used for top-k prompts.

    Raises:
        L2R2Error: when the localizer takes no prompts or adds masks, or the model lacks the branch full or fg.
    """
    if isinstance(localizer, Masked) or not isinstance(localizer, Prompted):
        raise L2R2Error(f"Top-k prompts need a localizer that takes prompts and adds no masks, e.g. owlv2; got {localizer.spec}.")
    if not {"full", "fg"} <= set(model.branches):
        raise L2R2Error(f"Top-k prompts need the branches full and fg; this model has {', '.join(model.branches)}.")
    return localizer


@torch.inference_mode()
def topk_prompts(
    model: L2R2, labels: Sequence[str], localizer: Prompted, images: Sequence[Image], k: int, box_threshold: float = 0.0
) -> Candidates:
    """Find and score one candidate per class that the full branch ranks highest; the best-scoring candidate wins.

    Args:
        model: in eval mode, with the branches full and fg.
        labels: class names; `_` becomes a space in the prompt.
        localizer: a prompted localizer, see `check_promptable`.
        images: B upright RGB images.
        k: number of classes to look for, at most all.
        box_threshold: boxes with a lower score count as not found.

    Returns:
        The candidates, k per image.
    """
    device, spec = next(model.parameters()).device, model.view_spec
    full_view = make_views(images, None, spec, branches=("full",), device=device).full
    full = model.forward_branches(full=full_view)["full"]
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
    class_logits = [full.gather(1, classes), *(z.gather(2, classes[..., None])[..., 0] for z in branches.values())]
    shape = (len(images), count)
    return Candidates(
        classes,
        torch.stack(class_logits).mean(0),
        boxes.reshape(*shape, 4),
        box_scores.reshape(shape),
        {"full": full, **branches},
    )


def _best(found: Detections, threshold: float) -> tuple[Tensor, float]:
    usable = found.above(threshold).usable()
    return (usable.boxes[0], float(usable.scores[0])) if len(usable) else (torch.full((4,), float("nan")), 0.0)

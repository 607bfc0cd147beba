"""How good a saliency map is: against the object's mask or box (RIVAL10), and by insertion and deletion (RISE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS = 8  # between nothing and everything


def against_mask(values: Tensor, inside: Tensor) -> dict[str, float]:
    """How well a map `[H, W]` agrees with an object `[H, W]` bool; a map of zeros has none of these.

    Returns:
        `share`: saliency inside over all. `flat`: a flat map's, the object's part of the image. With the map divided
        by its maximum, as in RIVAL10 (Moayeri et al. 2022, section 6): `iou` of the pixels above 0.5 with the object, `delta`,
        mean inside less mean outside, and `ap`, the average precision of its pixels.

    >>> inside = torch.tensor([[True, False], [False, False]])
    >>> {k: round(v, 2) for k, v in against_mask(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), inside).items()}
    {'share': 0.75, 'flat': 0.25, 'iou': 1.0, 'delta': 0.89, 'ap': 1.0}
    """
    if not bool(values.max() > 0) or not inside.any() or inside.all():
        return {}
    from sklearn.metrics import average_precision_score

    scaled = values / values.max()
    above = scaled > 0.5
    return {
        "share": min(1.0, float(values[inside].sum() / values.sum())),
        "flat": float(inside.float().mean()),
        "iou": float((above & inside).sum() / (above | inside).sum()),
        "delta": float(scaled[inside].mean() - scaled[~inside].mean()),
        "ap": float(average_precision_score(inside.flatten().numpy(), scaled.flatten().numpy())),
    }


def insertion_deletion(
    values: Tensor, pixels: Tensor, fill: Sequence[int], probability: Callable[[list[Tensor]], Tensor], steps: int = STEPS
) -> dict[str, float]:
    """Areas under the probability of a class while an image's pixels come, or go, the most salient first.

    A map that is right about the network has a high `insertion` and a low `deletion`, both 0 to 1 (RISE, Petsiuk et al.,
    BMVC 2018).

    Args:
        values: the map `[H, W]`; equal values come in a random order that is the same every time.
        pixels: uint8 `[H, W, 3]`.
        fill: color of the pixels that are not there.
        probability: of changed images, `[B]`.
        steps: of equally many pixels.
    """
    shuffled = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))
    order = shuffled[values.flatten()[shuffled].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    blank = torch.tensor(fill, dtype=torch.uint8)
    ends = [round(i * len(order) / steps) for i in range(steps + 1)]
    there = [(rank < end).unflatten(0, tuple(values.shape))[..., None] for end in ends]
    inserted = [torch.where(shown, pixels, blank) for shown in there]
    deleted = [torch.where(shown, blank, pixels) for shown in there[1:-1]]
    found = probability([*inserted, *deleted])
    insertion, inner = found[: steps + 1], found[steps + 1 :]
    deletion = torch.cat([insertion[-1:], inner, insertion[:1]])  # everything, and nothing, are the same images
    return {"insertion": float(torch.trapezoid(insertion) / steps), "deletion": float(torch.trapezoid(deletion) / steps)}

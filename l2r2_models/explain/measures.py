"""Metrics of saliency maps: agreement with the object's mask or box (RIVAL10), insertion and deletion (RISE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS = 8  # from the empty to the full image


def against_mask(values: Tensor, inside: Tensor) -> dict[str, float]:
    """Compute how well a map `[H, W]` agrees with an object mask `[H, W]` bool; empty for a map of zeros.

    Returns:
        `share`, the fraction of the saliency inside the object, and `flat`, the same for a constant map, which is the object's
        fraction of the image. As in RIVAL10 (Moayeri et al. 2022, section 6), with the map divided by its maximum: `iou` of
        the pixels above 0.5 with the object, `delta`, the mean inside minus the mean outside, and `ap`, the average precision
        of the pixels.

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
    """Compute the insertion and deletion metrics of a saliency map.

    They are the areas under the probability of a class while pixels are inserted, or deleted, in order of decreasing saliency. A
    faithful map has a high `insertion` and a low `deletion`; both are in [0, 1]. Source: RISE (Petsiuk et al., BMVC 2018).

    Args:
        values: the map `[H, W]`; ties are broken in a fixed random order.
        pixels: uint8 `[H, W, 3]`.
        fill: color of deleted pixels.
        probability: maps changed images to probabilities `[B]`.
        steps: number of steps, with equally many pixels each.
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
    deletion = torch.cat([insertion[-1:], inner, insertion[:1]])  # both curves share the full and the empty image
    return {"insertion": float(torch.trapezoid(insertion) / steps), "deletion": float(torch.trapezoid(deletion) / steps)}

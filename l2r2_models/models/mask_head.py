"""A trained mask head: the object's mask in the full view, from the last feature maps.

A model with a mask head needs no segmenter: the forward pass on the full view gives the mask and its box, and fg is cut from the
original image, e.g. with the background replaced (early masking, `docs/method.md`, Training).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import L2R2Error
from ..views import ViewSpec
from .box_head import FoundBoxes

FINER = 2  # maps besides the last one, the finest 4 times as fine: edges need more positions than a box


class MaskHead(nn.Module):
    """Predict the object's mask from the feature maps of a view.

    At most 32 channels, and one 3x3 convolution on the finest map, as in `BoxHead`; a second one gives 2x2 pixels per position.

    Args:
        channels: channels of each map, see `map_channels`.

    >>> head = MaskHead([64, 32])
    >>> head([torch.rand(2, 64, 4, 4), torch.rand(2, 32, 8, 8)]).shape
    torch.Size([2, 16, 16])
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        hidden = min(32, max(8, channels[0] // 8))
        self.reduce = nn.ModuleList(nn.Conv2d(c, hidden, 1) for c in channels)
        self.norm = nn.ModuleList(nn.GroupNorm(1, hidden) for _ in channels)  # some backbones' features are not normalized
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, 4, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute mask logits `[B, 2h, 2w]` from feature maps `[B, C, h, w]`, ordered coarse to fine."""
        size = maps[-1].shape[-2:]
        same = [functional.interpolate(n(r(m)), size, mode="bilinear") for r, n, m in zip(self.reduce, self.norm, maps)]
        x = functional.gelu(self.mix(functional.gelu(torch.stack(same).sum(0))))
        return functional.pixel_shuffle(self.out(x), 2)[:, 0]


class Found(NamedTuple):
    """What the heads on the full view found, see `L2R2Output`; None without the head."""

    located: FoundBoxes | None = None
    masks: Tensor | None = None

    @classmethod
    def by(cls, box_head: Any, mask_head: Any, maps: Sequence[Tensor]) -> Found:
        """Run the heads (or None) on the maps of a backbone, coarse to fine; a box head takes the coarser ones."""
        located = None if box_head is None else box_head(maps[: len(box_head.reduce)])
        return cls(located, None if mask_head is None else mask_head(maps))


def check_heads(box_head: Any, mask_head: Any, branches: Sequence[str], spec: ViewSpec) -> None:
    """Check that a box head or mask head (or None) suits the branches and views of its model.

    Raises:
        L2R2Error: when there is no square full view to look at, or fg is not cut out of the image.
    """
    heads = [name for name, head in (("box", box_head), ("mask", mask_head)) if head is not None]
    if heads and ("full" not in branches or spec.fg.in_network):
        modes = "an fg that is cropped" if heads[0] == "box" else "an fg that is cut out of the image"
        raise L2R2Error(f'A {heads[0]} head needs a full branch and {modes}, not fg_mode "{spec.fg_mode}" with {branches}.')
    if heads and spec.patch:
        raise L2R2Error(f"A {heads[0]} head needs square views; set patch to 0.")


def mask_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """The loss per row: the mean binary cross-entropy of the pixels, plus the dice loss (V-Net, arXiv 1606.04797).

    Args:
        logits: `[B, h, w]` of a `MaskHead`.
        masks: `[B, S, S]` in [0, 1], how much of each pixel of the view the object covers; it is averaged over the cells of the
            logits.

    Returns:
        `[B]`. For an empty mask the dice term is `1 - 1 / (1 + s)`, with `s` the sum of the probabilities.
    """
    target = functional.adaptive_avg_pool2d(masks[:, None].float(), (logits.shape[1], logits.shape[2]))[:, 0]
    logits = logits.float()
    each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    found = logits.sigmoid()
    overlap, total = (found * target).sum((1, 2)), (found + target).sum((1, 2))
    return each + 1 - (2 * overlap + 1) / (total + 1)

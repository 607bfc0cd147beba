"""The trained box head: one class-agnostic box and how sure it is, from the last feature maps of the full view's pass.

It makes a network that finds its own object: one full pass gives the box, fg is cut from the original image, no detector. The
design is this project's: each position of the map proposes a box, a softmax over the positions averages them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from .backbones import feature_info, feature_map

GIOU, L1, OBJECTNESS = 2.0, 5.0, 1.0  # as in DETR (arXiv 2005.12872), but L1 is the mean over the four ends


class FoundBoxes(NamedTuple):
    """One box a view: `boxes` `[B, 4]` xyxy as parts of the view's sides, `objectness` `[B]` logits."""

    boxes: Tensor
    objectness: Tensor

    def in_pixels(self, height: int, width: int, threshold: float) -> Tensor:
        """`[B, 4]` xyxy pixels of a view of that size, clipped to it; NaN where the object is less sure than the threshold."""
        boxes = self.boxes.float().clamp(0, 1) * self.boxes.new_tensor([width, height, width, height]).float()
        return boxes.masked_fill((self.objectness.float().sigmoid() < threshold)[:, None], float("nan"))


class BoxHead(nn.Module):
    """Feature maps of one view, coarse to fine, each `[B, C, h, w]` -> `FoundBoxes`.

    Less than 1 % of the operations of any backbone in the zoo: 32 channels, fewer where the backbone's own are few, one 3x3
    convolution on the finest map.

    Args:
        channels: of each map, see `map_channels`.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        hidden = min(32, max(8, channels[-1] // 8))
        self.reduce = nn.ModuleList(nn.Conv2d(c, hidden, 1) for c in channels)
        self.norm = nn.ModuleList(nn.GroupNorm(1, hidden) for _ in channels)  # features of some backbones come unnormalised
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, 6, 1)  # weight, objectness, centre x and y, width, height

    def forward(self, maps: Sequence[Tensor]) -> FoundBoxes:
        size = maps[-1].shape[-2:]
        same = [functional.interpolate(n(r(m)), size) for r, n, m in zip(self.reduce, self.norm, maps)]
        x = functional.gelu(torch.stack(same).sum(0))
        out = self.out(functional.gelu(self.mix(x))).float()  # [B, 6, h, w]
        rows, columns = out.shape[2:]
        x, y = _centres(columns, out), _centres(rows, out)
        centre_x = x[None, None, :] + out[:, 2] / columns
        centre_y = y[None, :, None] + out[:, 3] / rows
        half_width, half_height = out[:, 4].sigmoid() / 2, out[:, 5].sigmoid() / 2
        ends = (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height)
        weight = out[:, 0].flatten(1).softmax(1)  # [B, h*w]
        boxes = (torch.stack(ends, -1).flatten(1, 2) * weight[..., None]).sum(1)
        return FoundBoxes(boxes, (out[:, 1].flatten(1) * weight).sum(1))


def _centres(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def box_losses(found: FoundBoxes, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row: GIoU + L1 of the box, and cross-entropy of its objectness.

    Args:
        found: of B views.
        boxes: `[B, 4]` xyxy as parts of the view's sides; a NaN row has no object.

    Returns:
        `[B]` loss of the box, 0 where there is no object, and `[B]` loss of the objectness.
    """
    has_box = boxes.isfinite().all(1)
    target = torch.where(has_box[:, None], boxes, found.boxes.detach()).float().clamp(0, 1)
    distance = (found.boxes - target).abs().mean(1)
    of_box = GIOU * generalized_box_iou_loss(found.boxes, target) + L1 * distance
    of_object = functional.binary_cross_entropy_with_logits(found.objectness, has_box.float(), reduction="none")
    return torch.where(has_box, of_box, 0.0), OBJECTNESS * of_object


def _finer_stage(backbone: Any) -> int | None:
    """Index of the last stage with a map twice as fine as the last one's; None where there is none (plain ViTs).

    A 96-pixel view leaves a ResNet nine positions in its last map, too few to tell where an object ends.
    """
    stages = feature_info(backbone)
    finer = [i for i, stage in enumerate(stages) if 2 * stage["reduction"] == stages[-1]["reduction"]]
    return finer[-1] if finer and hasattr(backbone, "forward_intermediates") else None


def map_channels(backbone: Any) -> list[int]:
    """Channels of the maps that `features_and_maps` gives."""
    stage = _finer_stage(backbone)
    return [int(backbone.num_features), *([] if stage is None else [int(feature_info(backbone)[stage]["num_chs"])])]


def features_and_maps(backbone: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A timm backbone's `forward_features` of views `[B, C, H, W]`, and from the same pass the maps for a box head."""
    stage = _finer_stage(backbone)
    if stage is None:
        features = backbone.forward_features(x)
        return features, [feature_map(backbone, features, x)]
    last = len(feature_info(backbone)) - 1  # asked for too, since some backbones (hiera) stop at the last one asked for
    features, (finer, _) = backbone.forward_intermediates(x, indices=[stage, last])
    return features, [feature_map(backbone, features, x), finer]

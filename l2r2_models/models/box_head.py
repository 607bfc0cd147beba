"""A trained box head: one class-agnostic box and its objectness, from the last feature maps of the full view.

A model with a box head needs no detector: the forward pass on the full view gives the box, and fg is cut from the original
image. The design is this project's: each position of the map proposes a box, and a softmax over the positions averages them
(`docs/method.md`, Training).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from .backbones import feature_info, feature_map

GIOU, L1, OBJECTNESS = 2.0, 5.0, 1.0  # loss weights as in DETR (arXiv 2005.12872), but L1 is the mean over the four edges


class FoundBoxes(NamedTuple):
    """One box per view.

    Attributes:
        boxes: `[B, 4]` xyxy, relative to the view's sides.
        objectness: `[B]` logits.
    """

    boxes: Tensor
    objectness: Tensor

    def in_pixels(self, height: int, width: int, threshold: float) -> Tensor:
        """Convert to pixels of a view.

        Args:
            height: of the view.
            width: of the view.
            threshold: minimum objectness, as a probability, of a box that counts as found.

        Returns:
            `[B, 4]` xyxy pixels, clipped to the view; NaN where the objectness is below the threshold.

        >>> FoundBoxes(torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([3.0])).in_pixels(10, 20, threshold=0.5)
        tensor([[ 0.,  0., 10., 10.]])
        """
        boxes = self.boxes.float().clamp(0, 1) * self.boxes.new_tensor([width, height, width, height]).float()
        return boxes.masked_fill((self.objectness.float().sigmoid() < threshold)[:, None], float("nan"))


class BoxHead(nn.Module):
    """Predict one box from the feature maps of a view.

    It costs less than 1 % of the operations of any backbone in the zoo: at most 32 channels, and one 3x3 convolution on the
    finest map.

    Args:
        channels: channels of each map, see `map_channels`.

    >>> head = BoxHead([64, 32])
    >>> head([torch.rand(2, 64, 4, 4), torch.rand(2, 32, 8, 8)]).boxes.shape
    torch.Size([2, 4])
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        hidden = min(32, max(8, channels[-1] // 8))
        self.reduce = nn.ModuleList(nn.Conv2d(c, hidden, 1) for c in channels)
        self.norm = nn.ModuleList(nn.GroupNorm(1, hidden) for _ in channels)  # some backbones' features are not normalized
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, 6, 1)  # weight, objectness, center x and y, width, height

    def forward(self, maps: Sequence[Tensor]) -> FoundBoxes:
        """Find the box in feature maps `[B, C, h, w]`, ordered coarse to fine."""
        size = maps[-1].shape[-2:]
        same = [functional.interpolate(n(r(m)), size) for r, n, m in zip(self.reduce, self.norm, maps)]
        x = functional.gelu(torch.stack(same).sum(0))
        out = self.out(functional.gelu(self.mix(x))).float()  # [B, 6, h, w]
        rows, columns = out.shape[2:]
        x, y = _centers(columns, out), _centers(rows, out)
        center_x = x[None, None, :] + out[:, 2] / columns
        center_y = y[None, :, None] + out[:, 3] / rows
        half_width, half_height = out[:, 4].sigmoid() / 2, out[:, 5].sigmoid() / 2
        ends = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
        weight = out[:, 0].flatten(1).softmax(1)  # [B, h*w]
        boxes = (torch.stack(ends, -1).flatten(1, 2) * weight[..., None]).sum(1)
        return FoundBoxes(boxes, (out[:, 1].flatten(1) * weight).sum(1))


def _centers(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def box_losses(found: FoundBoxes, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The losses per row: GIoU + L1 of the box, and binary cross-entropy of the objectness.

    Args:
        found: the boxes found in B views.
        boxes: ground truth `[B, 4]` xyxy, relative to the view's sides; a NaN row has no object.

    Returns:
        `[B]` box loss, 0 where there is no object, and `[B]` objectness loss.
    """
    has_box = boxes.isfinite().all(1)
    target = torch.where(has_box[:, None], boxes, found.boxes.detach()).float().clamp(0, 1)
    distance = (found.boxes - target).abs().mean(1)
    of_box = GIOU * generalized_box_iou_loss(found.boxes, target) + L1 * distance
    of_object = functional.binary_cross_entropy_with_logits(found.objectness, has_box.float(), reduction="none")
    return torch.where(has_box, of_box, 0.0), OBJECTNESS * of_object


def _finer_stages(backbone: Any, count: int) -> list[int]:
    """Indices of the last stages whose maps are 2, 4, ... times as fine as the final one; none for plain ViTs.

    For a 96-pixel view, a ResNet's final map has nine positions, too few to locate an object's edges.
    """
    stages = feature_info(backbone)
    last = {stage["reduction"]: i for i, stage in enumerate(stages)}
    found = [last.get(stages[-1]["reduction"] // 2**n) for n in range(1, count + 1)]
    return [i for i in found if i is not None] if hasattr(backbone, "forward_intermediates") else []


def map_channels(backbone: Any, finer: int = 1) -> list[int]:
    """Channels of the maps that `features_and_maps` returns."""
    stages = feature_info(backbone)
    return [int(backbone.num_features), *(int(stages[i]["num_chs"]) for i in _finer_stages(backbone, finer))]


def features_and_maps(backbone: Any, x: Tensor, finer: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Run a timm backbone's `forward_features` once, and return the maps for a box head or mask head too.

    Args:
        backbone: the timm model.
        x: views `[B, C, H, W]`.
        finer: maximum number of finer maps besides the last one.

    Returns:
        The features, and the maps `[B, C, h, w]`, coarse to fine.
    """
    stages = _finer_stages(backbone, finer)
    if not stages:
        features = backbone.forward_features(x)
        return features, [feature_map(backbone, features, x)]
    last = len(feature_info(backbone)) - 1  # requested too, since some backbones (hiera) stop at the last requested stage
    features, maps = backbone.forward_intermediates(x, indices=[*stages[::-1], last])
    return features, [feature_map(backbone, features, x), *maps[-2::-1]]

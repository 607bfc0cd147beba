"""The trained box head: one class-agnostic box and how sure it is, from the last feature map of the full view's pass.

It makes a network that finds its own object: one full pass gives the box, fg is cut from the original image, no detector. The
design is this project's: each position of the map proposes a box, a softmax over the positions averages them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

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
    """Feature maps `[B, C, h, w]` -> `FoundBoxes`.

    Less than 1 % of any backbone's operations: `hidden` channels, one 3x3 convolution.
    """

    def __init__(self, channels: int, hidden: int = 32) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.GroupNorm(1, hidden)  # features of some backbones come unnormalised
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, 6, 1)  # weight, objectness, centre x and y, width, height

    def forward(self, features: Tensor) -> FoundBoxes:
        x = functional.gelu(self.norm(self.reduce(features)))
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


def feature_map(backbone: Any, features: Tensor, view: Tensor) -> Tensor:
    """A timm backbone's `forward_features` of views `[B, C, H, W]` as a map `[B, C, h, w]`, prefix tokens left out."""
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    rows = round(math.sqrt(patches.shape[1] * view.shape[2] / view.shape[3]))
    return patches.transpose(1, 2).unflatten(2, (rows, -1))

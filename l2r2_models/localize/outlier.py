"""Boxes without a detector, prompt or training: the part of an image whose features differ most from those at its border."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..boxes.detections import Detections
from ..models.backbones import feature_info
from .base import Context, LocalizerSpec, Option, whole
from .features import FeatureLocalizer, finite
from .regions import box_of, inside_view, largest_region, otsu
from .unsupervised import patch_features

STRIDES = (4, 8, 16)  # of the feature maps used, as far as the network has them
BORDER = 1 / 16  # width of the border, as a share of the shorter side
ONE_COLOR = 2  # levels per channel by which an image of one color may vary, e.g. by JPEG's rounding
SHRINKAGE = 0.1  # of the covariance; a border has fewer patches than some maps have channels


class Outlier(FeatureLocalizer):
    """The region whose features are the strongest outliers of those at the image's border.

    The border is assumed to show the background. A Gaussian is fitted to its features in each map, and the Mahalanobis distances
    of all patches to it are multiplied over the maps (`docs/method.md`, section 6); Otsu's threshold and the region with the
    largest sum give the box. Such distances are known for pixels as the RX detector (Reed and Yu, 1990), and for features of
    pretrained networks from anomaly detection (Rippel et al., ICPR 2020); the statistics of one image's border and the product
    are this project's.

    It finds one object that does not fill the border, best on a uniform ground: conveyor belts, soil, slides, sky. Every score
    is 1. An image of one color has no object. Without a source, the network is EfficientNet-Lite0 with timm's ImageNet weights.

    Options: `size` (side of the view in pixels).
    """

    name = "outlier"
    default_source = "timm:tf_efficientnet_lite0.in1k"
    known_options: ClassVar = {"size": Option(whole(32, 2048), 256, "a number of pixels from 32 to 2048")}

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec if spec.source else replace(spec, source=self.default_source), context)

    def features_of(self, views: Tensor) -> list[Tensor]:
        """The maps of strides 4, 8 and 16 that a hierarchical network has; for a ViT, the keys of its last attention layer."""
        backbone = self.model.backbone
        levels = [i for i, stage in enumerate(feature_info(backbone)) if stage["reduction"] in STRIDES]
        strides = {feature_info(backbone)[i]["reduction"]: i for i in levels}  # the last stage of each stride
        if len(strides) < 2:
            return [patch_features(backbone, views)]
        maps: list[Tensor] = backbone.forward_intermediates(
            views, indices=sorted(strides.values()), output_fmt="NCHW", intermediates_only=True
        )
        return maps

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Find the strongest outlier of each image; at most one box per image."""
        views, views_to_images = self.full_views(images, self.options["size"])
        maps = [finite(features).cpu() for features in self.features_of(views)]
        grid = maps[0].shape[2:]
        found = []
        for i, (image, view) in enumerate(zip(images, views_to_images)):
            if np.ptp(np.asarray(image), axis=(0, 1)).max() <= ONE_COLOR:  # the features differ where the network pads
                found.append(Detections.from_lists([], (image.height, image.width)))
                continue
            windows = [inside_view(view, image, features.shape[2:]) for features in maps]
            score = outlier_score([f[i, :, top:bottom, left:right] for f, ((top, bottom), (left, right)) in zip(maps, windows)])
            (top, _), (left, _) = windows[0]
            found.append(box_of(largest_region(score > otsu(score), score), (top, left), grid, view, image))
        return found


def outlier_score(maps: Sequence[Tensor]) -> Tensor:
    """Multiply the Mahalanobis distances to the border over feature maps.

    Args:
        maps: `[C, h, w]` of one image, fine to coarse; each may have its own C, h and w.

    Returns:
        `[h, w]` of the first map, at least 0.

    >>> patches = torch.zeros(1, 8, 8)
    >>> patches[0, 3, 4] = 1.0
    >>> outlier_score([patches]).argmax().item() == 3 * 8 + 4
    True
    """
    score = torch.ones(maps[0].shape[1:])
    for features in maps:
        distance = border_distance(features)
        distance = distance / distance.mean().clamp(min=1e-12)
        score = score * interpolate(distance[None, None], score.shape, mode="bilinear", align_corners=False)[0, 0]
    return score


def border_distance(features: Tensor) -> Tensor:
    """Compute the Mahalanobis distance of each patch to the patches at the border.

    The covariance is shrunk toward a multiple of the identity matrix.

    Args:
        features: `[C, h, w]` of one image.

    Returns:
        `[h, w]`.
    """
    height, width = features.shape[1:]
    thickness = max(1, round(BORDER * min(height, width)))
    inner = torch.zeros(height, width, dtype=torch.bool)
    inner[thickness : height - thickness, thickness : width - thickness] = True
    patches = features.flatten(1).double()
    border = patches[:, ~inner.flatten()]
    mean = border.mean(1, keepdim=True)
    centered = border - mean
    covariance = centered @ centered.T / border.shape[1]
    identity = torch.eye(len(covariance), dtype=torch.double)
    spread = covariance.diagonal().mean().clamp(min=1e-12)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * spread * identity
    offset = patches - mean
    squared: Tensor = (offset * torch.linalg.solve(covariance, offset)).sum(0)
    return squared.clamp(min=0).sqrt().reshape(height, width).float()

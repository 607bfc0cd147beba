"""Boxes without a detector, from a classifier's own network (`docs/method.md`, section 6).

A normalized cut of its patch features, the attention of its class token, or the class activation map of its full branch. None
gives a confidence: every score is 1.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar, NoReturn

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..models.backbones import attention_layers, attention_of, feature_info, feature_map, last_map_through
from .base import Context, LocalizerSpec, Option, number, whole
from .features import FeatureLocalizer, finite
from .model_based import ModelLocalizer
from .regions import box_of, inside_view, label_regions, largest_region, otsu

LEVEL = Option(lambda text: text if text == "otsu" else number(0, 1)(text), "otsu", "otsu or a number between 0 and 1")
MAX_STRIDE = 16  # of the feature map used for the cut; the last map of a CNN is too coarse for small objects


class NormalizedCut(FeatureLocalizer):
    """TokenCut: a normalized cut of the similarity graph of patch features.

    Patches whose features are similar are connected, and the graph is cut in two. The side with the most extreme patch is the
    object; its connected region around that patch gives the box. Implemented from the description in Wang et al. (CVPR 2022).

    The source is a run, a Hub id, or `timm:NAME.TAG`; the paper uses `timm:vit_small_patch16_224.dino`. The prefix `timm:` may
    be left out if there is no folder of that name. A ViT is cut by the keys of its last attention layer, as in the paper; other
    networks by their last feature map of stride 16 or less, with its mean subtracted (an addition of this project).

    Options: `tau` (cosine similarity above which patches are connected), `size` (side of the view in pixels, by default the
    model's; the position embeddings of a ViT are resampled to it).
    """

    name = "ncut"
    known_options: ClassVar = {
        "tau": Option(number(-1, 1), 0.2, "a cosine between -1 and 1"),
        "size": Option(whole(32, 2048), None, "a number of pixels from 32 to 2048"),
    }

    def features_of(self, views: Tensor) -> list[Tensor]:
        """The map that is cut."""
        return [patch_features(self.model.backbone, views)]

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Cut the patch features of each image; at most one box per image."""
        views, maps = self.full_views(images, self.options["size"])
        (features,) = self.features_of(views)
        features = finite(features)  # [B, C, h, w]
        found = []
        for image, view, of_image in zip(images, maps, features):
            (top, bottom), (left, right) = inside_view(view, image, of_image.shape[1:])
            mask = normalized_cut(of_image[:, top:bottom, left:right], self.options["tau"])
            found.append(box_of(mask, (top, left), of_image.shape[1:], view, image))
        return found


class Attention(FeatureLocalizer):
    """The attention of the class token to the patches in a ViT's last layer, averaged over the heads.

    In a self-supervised ViT, it concentrates on the objects (Caron et al., "Emerging Properties in Self-Supervised Vision
    Transformers", ICCV 2021). Of the regions in which it exceeds a level, the one with the largest sum gives the box. The paper's
    figures keep 60 % of the sum instead, which would cut off parts of an object that has even attention.

    The source is a run, a Hub id, or `timm:NAME.TAG`, e.g. `timm:vit_small_patch16_224.dino`.

    Options: `level` (see `ActivationMap`), `size` (see `NormalizedCut`).
    """

    name = "attn"
    known_options: ClassVar = {
        "level": LEVEL,
        "size": NormalizedCut.known_options["size"],
    }

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self._check()
        size = self.options["size"] or self.model.view_spec.size_of("full")
        with torch.inference_mode(), suppress(RuntimeError, ValueError):
            class_attention(self.model.backbone, torch.zeros(1, 3, size, size, device=context.device))
            return
        self._refuse()  # XCiT attends to channels

    def _check(self) -> None:
        if not attention_layers(self.model.backbone) or getattr(self.model.backbone, "cls_token", None) is None:
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise L2R2Error(f"{self.spec}: attn needs a plain ViT with a class token, e.g. timm:vit_small_patch16_224.dino.")

    def features_of(self, views: Tensor) -> list[Tensor]:
        """The attention map `[B, 1, h, w]`."""
        self._check()
        return [class_attention(self.model.backbone, views)[:, None]]

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Threshold the attention of each image; at most one box per image."""
        views, maps = self.full_views(images, self.options["size"])
        (attention,) = self.features_of(views)
        found = []
        for image, view, of_image in zip(images, maps, finite(attention)[:, 0].cpu()):
            (top, bottom), (left, right) = inside_view(view, image, of_image.shape)
            part = of_image[top:bottom, left:right]
            region = largest_region(part > level_of(part, self.options["level"]), part)
            found.append(box_of(region, (top, left), of_image.shape, view, image))
        return found


class ActivationMap(ModelLocalizer):
    """Grad-CAM of the most probable class of the full branch (Selvaraju et al., ICCV 2017).

    Of the regions in which the map exceeds a level, the one with the largest sum gives the box. The map is that of the last
    feature map for networks with average pooling, and of the input to the last attention layer for a ViT with a class token.

    Options: `level` (`otsu`, or a share of the map's maximum).
    """

    name = "cam"
    known_options: ClassVar = {"level": LEVEL}

    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Threshold the activation map of each image; at most one box per image."""
        views, maps = self.full_views(images)
        size = views.shape[-1]
        cams = finite(activation_map(self.model, views))[:, None]
        cams = interpolate(cams, (size, size), mode="bilinear", align_corners=False)[:, 0]
        found = []
        for image, view, cam in zip(images, maps, cams.cpu()):
            (top, bottom), (left, right) = inside_view(view, image, cam.shape)
            part = cam[top:bottom, left:right]
            region = largest_region(part > level_of(part, self.options["level"]), part)
            found.append(box_of(region, (top, left), cam.shape, view, image))
        return found


def class_attention(backbone: Any, views: Tensor) -> Tensor:
    """Compute the attention `[B, h, w]` of the class token to the patches in the last layer, averaged over the heads.

    Args:
        backbone: a plain timm ViT with a class token.
        views: `[B, C, S, S]`.
    """
    with attention_of(attention_layers(backbone)[-1:]) as seen:
        backbone.forward_features(views)
    return feature_map(backbone, seen[0].float().mean(1)[:, 0, :, None], views)[:, 0]


def level_of(values: Tensor, level: str | float) -> float:
    """Return the level that the option `level` means for a map: Otsu's, or a share of its maximum."""
    return otsu(values) if isinstance(level, str) else level * float(values.max())


def patch_features(backbone: Any, views: Tensor) -> Tensor:
    """Compute the features for the normalized cut.

    Args:
        backbone: a timm model.
        views: `[B, C, S, S]`.

    Returns:
        `[B, D, h, w]`: the keys of a ViT's last attention layer; for other networks, the last feature map of stride 16 or less
        minus its mean.
    """
    attention: Any = getattr(backbone.blocks[-1], "attn", None) if hasattr(backbone, "blocks") else None
    if hasattr(backbone, "num_prefix_tokens") and hasattr(attention, "qkv"):
        seen: list[Tensor] = []
        handle = attention.qkv.register_forward_hook(lambda module, inputs, out: seen.append(out))
        try:
            backbone.forward_features(views)
        finally:
            handle.remove()
        if seen:  # some networks (EVA) use the weights of the layer without calling it
            return feature_map(backbone, seen[0].chunk(3, -1)[1], views)
    info = feature_info(backbone)
    level = max((i for i, f in enumerate(info) if f["reduction"] <= MAX_STRIDE), default=len(info) - 1)
    maps: list[Tensor] = backbone.forward_intermediates(views, indices=[level], output_fmt="NCHW", intermediates_only=True)
    (features,) = maps
    return features - features.mean((2, 3), keepdim=True)


def normalized_cut(features: Tensor, tau: float) -> Tensor:
    """Segment the object by a normalized cut of the patch graph.

    Args:
        features: `[C, h, w]` of one image.
        tau: cosine similarity above which two patches are connected.

    Returns:
        `[h, w]` bool, True on the object.
    """
    height, width = features.shape[1:]
    nodes = normalize(features.flatten(1).T.double(), dim=1)
    joined = torch.where(nodes @ nodes.T > tau, 1.0, 1e-5).double()
    degree = joined.sum(1)
    scale = degree.rsqrt()
    laplacian = torch.eye(len(nodes), dtype=torch.double, device=nodes.device) - scale[:, None] * joined * scale
    second = torch.linalg.eigh(laplacian).eigenvectors[:, min(1, len(nodes) - 1)] * scale  # of (D - A) x = lambda D x
    seed = int(second.abs().argmax())
    side = second > second.mean()
    mask = (side if side[seed] else ~side).reshape(height, width).cpu()
    return label_regions(mask) == label_regions(mask)[seed // width, seed % width]


def activation_map(model: Any, views: Tensor) -> Tensor:
    """Compute Grad-CAM for the most probable class of the model's first branch.

    Args:
        model: an `L2R2` in eval mode.
        views: `[B, C, S, S]`.

    Returns:
        `[B, h, w]`, at least 0.
    """
    branch, seat = model.branches[0], nn.Identity()
    backbone, seen = model.backbone_of(branch), []

    def keep(module: Any, inputs: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[0]

    seat.register_forward_hook(keep)
    with torch.inference_mode(False), torch.enable_grad():
        x = views.clone()  # a tensor made in inference mode has no gradients
        with last_map_through(backbone, seat, x):
            score = model.heads[branch](backbone(x)).amax(1).sum()
        (gradient,) = torch.autograd.grad(score, seen)
    return (gradient.mean((2, 3), keepdim=True) * seen[0].detach()).sum(1).clamp(min=0)

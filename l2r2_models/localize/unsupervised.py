"""Boxes without a detector, from what a classifier's own network knows (METHOD.md 6): a normalised cut of its patch features,
the class activation map of its full branch, the parts of an ifam model. None of them gives a confidence: every score is 1."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import timm
import torch
from PIL.Image import Image, new
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ..boxes.detections import Detections, ViewMap
from ..errors import L2R2Error
from ..models.backbones import feature_map, last_map_through
from ..models.weights import create_pretrained
from ..views import ViewSpec
from .base import Context, Localizer, Option, Spec, number, whole
from .model_based import Looking, one_box

MAX_STRIDE = 16  # of the feature map that is cut: the last one of a pyramid is too coarse to find a small object in


class NormalisedCut(Looking):
    """TokenCut (Wang et al., CVPR 2022), from its description: patches that look alike are joined, the graph is cut in two,
    the part with the most extreme patch is the object, its connected region around that patch gives the box.

    Source: a run, a Hub id, or `timm:NAME.TAG` (`timm:vit_small_patch16_224.dino` is what the paper takes; without `timm:` too,
    where no folder is called so). A ViT is cut by the keys of its last attention, as in the paper; other networks by their last
    feature map of stride 16 or less, less its mean (this project's).

    Options: `tau` (cosine similarity above which patches are joined), `size` (side of the view, default the model's; a ViT's
    position embeddings are resampled to it).
    """

    name = "ncut"
    source = "a run, a Hub id or timm:NAME"
    known_options: ClassVar = {
        "tau": Option(number(-1, 1), 0.2, "a cosine between -1 and 1"),
        "size": Option(whole(32, 2048), None, "a number of pixels from 32 to 2048"),
    }

    def __init__(self, spec: Spec, context: Context) -> None:
        if timm.is_model(spec.source) and not Path(spec.source).exists():
            spec = replace(spec, source=f"timm:{spec.source}")
        if spec.source.startswith("timm:"):
            self._load_from_timm(spec, context)
        else:
            super().__init__(spec, context)
        size = self.options["size"]
        if size not in (None, self.model.view_spec.size):
            views, _ = self.full_views([new("RGB", (size, size))], size)
            sized = SimpleNamespace(backbone=_for_views(self.model.backbone, views, str(spec)), view_spec=self.model.view_spec)
            self.model = sized  # type: ignore[assignment]

    def _load_from_timm(self, spec: Spec, context: Context) -> None:
        Localizer.__init__(self, spec, context)
        name = spec.source.removeprefix("timm:")
        try:
            backbone: Any = create_pretrained(name, num_classes=0)
        except Exception as error:  # timm, the hub and torch each have their own
            raise L2R2Error(f"{name}: timm cannot load it ({' '.join(str(error).split())[:200]}).") from error
        views = ViewSpec.from_pretrained_cfg(backbone.pretrained_cfg)
        self.model = SimpleNamespace(backbone=backbone.to(context.device).eval(), view_spec=views)  # type: ignore[assignment]

    @property
    def weights(self) -> str | None:
        return None if self.spec.source.startswith("timm:") else super().weights

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        views, maps = self.full_views(images, self.options["size"])
        features = _finite(patch_features(self.model.backbone, views))  # [B, C, h, w]
        found = []
        for image, view, of_image in zip(images, maps, features):
            (top, bottom), (left, right) = _inside(view, image, of_image.shape[1:])
            mask = normalised_cut(of_image[:, top:bottom, left:right], self.options["tau"])
            found.append(_box_of(mask, (top, left), of_image.shape[1:], view, image))
        return found


class ActivationMap(Looking):
    """Grad-CAM (Selvaraju et al., ICCV 2017) of the most probable class of the full branch; the region above a level that
    holds the most of it gives the box.

    A network that pools by the mean is looked at in its last feature map, a ViT with a class token before its last attention.

    Options: `level`: `otsu`, or a part of the map's maximum.
    """

    name = "cam"
    known_options: ClassVar = {
        "level": Option(lambda text: text if text == "otsu" else number(0, 1)(text), "otsu", "otsu or a part between 0 and 1")
    }

    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        views, maps = self.full_views(images)
        size = views.shape[-1]
        cams = _finite(activation_map(self.model, views))[:, None]
        cams = interpolate(cams, (size, size), mode="bilinear", align_corners=False)[:, 0]
        found = []
        for image, view, cam in zip(images, maps, cams.cpu()):
            (top, bottom), (left, right) = _inside(view, image, cam.shape)
            part = cam[top:bottom, left:right]
            level = otsu(part) if self.options["level"] == "otsu" else self.options["level"] * float(part.max())
            found.append(_box_of(largest_region(part > level, part), (top, left), cam.shape, view, image))
        return found


class Parts(Looking):
    """What stage 1 of an ifam model keeps: its largest region gives the box, all of it the mask."""

    name = "parts"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        if not self.model.finds_object:
            raise L2R2Error(f"{self.checkpoint.name}: finds no parts; that is what the ifam models do.")

    @torch.inference_mode()
    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        views, maps = self.full_views(images)
        kept = self.model.find_parts(views).keep.cpu()  # type: ignore[operator]
        found = []
        for image, view, keep in zip(images, maps, kept):
            box = _box_of(largest_region(keep, keep.float()), (0, 0), keep.shape, view, image)
            mask = view.map_to_image(keep, (image.height, image.width)) > 0.5
            found.append(replace(box, masks=mask[None]) if len(box) else box)
        return found


@torch.no_grad()
def _for_views(backbone: Any, views: Tensor, name: str) -> Any:
    """The backbone, or a copy of it, that takes such views `[1, C, S, S]`.

    Raises:
        L2R2Error: it takes none of that size.
    """
    try:
        if hasattr(backbone, "set_input_size"):
            backbone = copy.deepcopy(backbone)  # whoever else holds the network keeps its size
            backbone.set_input_size(tuple(views.shape[-2:]))
        patch_features(backbone, views)
    except (AssertionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise L2R2Error(f"{name}: this network takes no views of {views.shape[-1]} pixels ({why}).") from error
    return backbone


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise L2R2Error("the network gives numbers that are not finite; its training has diverged.")
    return values


def patch_features(backbone: Any, views: Tensor) -> Tensor:
    """`[B, C, h, w]`: keys of a ViT's last attention, else the last feature map of stride 16 or less minus its mean."""
    attention: Any = getattr(backbone.blocks[-1], "attn", None) if hasattr(backbone, "blocks") else None
    if hasattr(backbone, "num_prefix_tokens") and hasattr(attention, "qkv"):
        seen: list[Tensor] = []
        handle = attention.qkv.register_forward_hook(lambda module, inputs, out: seen.append(out))
        try:
            backbone.forward_features(views)
        finally:
            handle.remove()
        if seen:  # some networks (EVA) take the weights of the layer without calling it
            return feature_map(backbone, seen[0].chunk(3, -1)[1], views)
    info = list(backbone.feature_info.info if hasattr(backbone.feature_info, "info") else backbone.feature_info)
    level = max((i for i, f in enumerate(info) if f["reduction"] <= MAX_STRIDE), default=len(info) - 1)
    (features,) = backbone.forward_intermediates(views, indices=[level], output_fmt="NCHW", intermediates_only=True)
    return features - features.mean((2, 3), keepdim=True)


def normalised_cut(features: Tensor, tau: float) -> Tensor:
    """Features `[C, h, w]` of one image -> `[h, w]` bool, its object."""
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
    return _regions(mask) == _regions(mask)[seed // width, seed % width]


def activation_map(model: Any, views: Tensor) -> Tensor:
    """Grad-CAM `[B, h, w]` of the first branch's most probable class, for views `[B, C, S, S]`; not below 0."""
    branch, seat = model.branches[0], nn.Identity()
    backbone, seen = model.backbone_of(branch), []

    def keep(module: Any, inputs: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[0]

    seat.register_forward_hook(keep)
    with torch.inference_mode(False), torch.enable_grad():
        x = views.clone()  # a tensor of inference mode has no gradients
        with last_map_through(backbone, seat, x):
            score = model.heads[branch](backbone(x)).amax(1).sum()
        (gradient,) = torch.autograd.grad(score, seen)
    return (gradient.mean((2, 3), keepdim=True) * seen[0].detach()).sum(1).clamp(min=0)


def otsu(values: Tensor, bins: int = 256) -> float:
    """The level that splits values into two classes of least variance within each (Otsu 1979)."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts = torch.histc(values.float(), bins, low, high).double()
    centres = torch.linspace(low, high, 2 * bins + 1, dtype=torch.double)[1::2]
    below, mass = counts.cumsum(0)[:-1], (counts * centres).cumsum(0)[:-1]
    above, rest = counts.sum() - below, (counts * centres).sum() - mass
    between = below * above * (mass / below.clamp(min=1) - rest / above.clamp(min=1)) ** 2
    return float(centres[between.argmax()])


def largest_region(mask: Tensor, weight: Tensor) -> Tensor:
    """The 4-connected region of a mask `[h, w]` that holds the most of `weight`; nothing of an empty mask."""
    regions = _regions(mask)
    sums = torch.zeros(int(regions.max()) + 1, dtype=torch.double).index_add_(0, regions.flatten(), weight.double().flatten())
    sums[0] = -1.0  # what is not in the mask
    return (regions == int(sums.argmax())) & mask


def _regions(mask: Tensor) -> Tensor:
    try:
        from scipy.ndimage import label
    except ImportError as error:
        raise L2R2Error('ncut, cam and parts need more packages: pip install "l2r2-models[detect]".') from error
    return torch.from_numpy(label(mask.numpy())[0]).long()


def _inside(view: ViewMap, image: Image, grid: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a grid over the view whose middles show the image and not its padding; at least one of each."""
    x0, y0, x1, y1 = view.boxes_to_view(torch.tensor([0.0, 0, image.width, image.height])).tolist()

    def cells(start: float, end: float, side: int, count: int) -> tuple[int, int]:
        middles = [(i + 0.5) * side / count for i in range(count)]
        inside = [i for i, middle in enumerate(middles) if start <= middle < end] or [count // 2]
        return inside[0], inside[-1] + 1

    return cells(y0, y1, view.view_size[0], grid[0]), cells(x0, x1, view.view_size[1], grid[1])


def _box_of(mask: Tensor, offset: tuple[int, int], grid: Sequence[int], view: ViewMap, image: Image) -> Detections:
    """The box around a mask that lies at `offset` (row, column) in a grid over the view."""
    found = Detections.from_mask(mask)
    if not len(found):
        return Detections.from_lists([], (image.height, image.width))
    top, left = offset
    cell = torch.tensor([view.view_size[1] / grid[1], view.view_size[0] / grid[0]]).repeat(2)
    return one_box(view.boxes_to_image((found.boxes[0] + torch.tensor([left, top, left, top])) * cell), 1.0, image)

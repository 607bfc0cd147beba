"""The two-branch classifier: a timm backbone, one head per branch, and a fusion, behind the interface of a timm model."""

# no `from __future__ import annotations`: FX and jit need forward's annotations as types, not as strings

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import timm
import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from ..boxes.detections import BOX_THRESHOLD
from ..errors import L2R2Error
from ..fusion import Fusion, create_fusion, fuse_branches
from ..views import ViewSpec, batch_views, check_branches
from .backbones import check_backbone_arguments, check_view_sizes, feature_info, unknown_backbone
from .box_head import BoxHead, FoundBoxes, features_and_maps, map_channels
from .mask_head import FINER, Found, MaskHead, check_heads
from .masking import check_late_backbone, check_mask, check_tokens_backbone, late_features, token_features
from .native import check_native_backbone, native_by_backbone
from .parts import PartMaps, PartWeights
from .timm_contract import TimmContract


class L2R2Output(NamedTuple):
    """The output of `L2R2.forward_views`.

    Attributes:
        full, fg, bg: logits `[B, classes]`, or None if the branch was not computed.
        fused: logits `[B, classes]` of the fusion.
        has_fg: `[B]` bool, the rows in which fg saw an object: those given, minus those whose mask keeps nothing.
        parts: the parts that an `IFAM` found.
        located: the boxes that a box head found in the full view.
        masks: `[B, h, w]`, the logits of a mask head over the full view.
    """

    full: Tensor | None
    fg: Tensor | None
    fused: Tensor
    bg: Tensor | None
    has_fg: Tensor
    parts: PartMaps | None = None
    located: FoundBoxes | None = None
    masks: Tensor | None = None

    def branches(self) -> dict[str, Tensor]:
        """The logits of the computed branches, by name."""
        return {b: z for b, z in (("full", self.full), ("fg", self.fg), ("bg", self.bg)) if z is not None}


@torch.fx.wrap  # for plain FX
@register_notrace_function  # for timm's
def whole_image_only(x: Tensor, boxes: Optional[Tensor], localize: Optional[str] = None) -> Tensor:  # noqa: UP045  (for jit)
    """Refuse boxes in an FX graph, which has no box path, instead of ignoring them.

    Raises:
        ValueError: when boxes or `localize` are given.
    """
    if boxes is not None or localize is not None:
        raise ValueError("an FX-traced L2R2 takes whole images only; pass boxes to the untraced model")
    return x


class L2R2(TimmContract):
    """Localize to Recognize Robustly: a classifier that sees the whole image, and the object cut out of it.

    `model(x)` is an ordinary timm classifier, the head of the first branch. `forward_views` takes the views of all branches. With
    a shared backbone, views of one size pass through it as one batch, so batch norm is trained on the statistics of both;
    `shared=False` separates them. Source: L2R2 (arXiv 2411.15933), section 3 and appendix B; the shared backbone is this
    project's (`docs/method.md`, Training).

    Args:
        backbone: name of a timm model that can be built with `num_classes=0`.
        num_classes: classes of every head; 0 returns pooled features.
        in_chans: input channels.
        branches: which of full, fg and bg the model has. `model(x)` uses the first; `("full",)` is a plain classifier.
        shared: whether the branches share one backbone; False gives each its own, like the paper's independent networks.
        fusion: name or config of a fusion (`l2r2_models.fusion`). The default threshold of `robust` is not fitted.
        views: how views are cut, a `ViewSpec` or its dict; by default derived from the pretrained cfg.
        fg_mode: what the fg branch sees, see `ViewSpec`; replaces that of `views`.
        box_head: whether a trained head finds the object's box in the full view, see `BoxHead`.
        mask_head: whether a trained head finds the object's mask in the full view, see `MaskHead`.
        prototype_dim: dimension of the embedding that the heads compare with class prototypes, see `CosineHead`; 0: linear heads.
        drop_rate: dropout before the heads.
        device, dtype: of all parameters and buffers.
        **backbone_kwargs: arguments of the timm backbone (`drop_path_rate`, `img_size`, `global_pool`, ...).

    Raises:
        L2R2Error: when a backbone, branch, fusion or view field is unknown, or the backbone does not support the fg mode.

    >>> model = L2R2("resnet18", num_classes=10).eval()
    >>> out = model.forward_views(full=torch.rand(2, 3, 64, 64), fg=torch.rand(2, 3, 64, 64))
    >>> out.fused.shape, model(torch.rand(2, 3, 64, 64)).shape
    (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    __jit_unused_properties__ = ("view_spec", "takes_mask")
    finds_object = False  # whether the network finds its object itself, without boxes or masks
    fresh: tuple[str, ...] = ("fusion.", "box_head.", "mask_head.")  # of no timm checkpoint; stay as initialized

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        branches: str | Sequence[str] = ("full", "fg"),
        shared: bool = True,
        fusion: str | Mapping[str, Any] = "robust",
        views: ViewSpec | Mapping[str, Any] | None = None,
        fg_mode: str | None = None,
        box_head: bool = False,
        mask_head: bool = False,
        prototype_dim: int = 0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        self.pretrained_cfg: dict[str, Any] = {}  # set by timm
        self.branches = check_branches(branches)
        if not timm.is_model(backbone.split(".")[0]):
            raise L2R2Error(unknown_backbone(backbone))
        check_backbone_arguments(backbone, backbone_kwargs)
        self.backbone_name = backbone
        self.backbone_kwargs = {**backbone_kwargs, **({"drop_rate": drop_rate} if drop_rate else {})}
        self.shared = shared
        self.num_classes, self.in_chans, self.prototype_dim = num_classes, in_chans, prototype_dim
        spec = ViewSpec.from_dict(views) if isinstance(views, Mapping) else views
        self._view_spec = ViewSpec.from_dict({**spec.to_dict(), "fg_mode": fg_mode}) if spec is not None and fg_mode else spec
        self._fg_mode = fg_mode or "crop"

        def build() -> Any:  # a timm model has methods beyond those of nn.Module
            return timm.create_model(backbone, num_classes=0, in_chans=in_chans, drop_rate=drop_rate, **backbone_kwargs)

        with contextlib.nullcontext() if device is None else torch.device(device):
            self.backbone: Any = build()
            self.branch_backbones = nn.ModuleDict({b: build() for b in self.branches[1:] if not shared})
        self.num_features = int(self.backbone.num_features)
        self.head_hidden_size = int(self.backbone.head_hidden_size)
        self.feature_info = [{**i, "module": f"backbone.{i['module']}"} for i in feature_info(self.backbone)]
        if hasattr(self.backbone, "output_fmt"):
            self.output_fmt = self.backbone.output_fmt
        self.heads = nn.ModuleDict({b: self._new_head(b) for b in self.branches})
        self.fusion: Fusion = create_fusion(fusion, self.branches, num_classes)
        self.box_head = BoxHead(map_channels(self.backbone)) if box_head else None
        self.mask_head = MaskHead(map_channels(self.backbone, FINER)) if mask_head else None
        if hasattr(self.backbone, "set_input_size"):  # timm tests for the attribute
            self.set_input_size = self._set_input_size
        self._check_views(self.view_spec)
        self.to(device=device, dtype=dtype)

    # ---- inference and training ----

    def forward(self, x: Tensor, boxes: Optional[Tensor] = None, localize: Optional[str] = None) -> Tensor:  # noqa: UP045  (jit)
        """Logits `[B, classes]` of normalized images.

        Without boxes, the first head (full) exactly; in training the mean of the heads, so that timm's scripts train all
        parameters. With boxes, the fused logits, with fg cut out of `x`; views cut from the original image (`forward_views`)
        show more detail.

        Args:
            x: images `[B, C, H, W]`.
            boxes: `[B, 4]` xyxy in pixels of `x`; a NaN row has no box.
            localize: `head` takes the boxes of the model's own box head.

        Raises:
            L2R2Error: when both `boxes` and `localize` are given, or one is not valid.
        """
        if boxes is not None or localize is not None:
            if torch.jit.is_scripting():
                raise RuntimeError("a scripted L2R2 takes whole images only; pass boxes to the unscripted model")
            else:
                if not isinstance(boxes, torch.fx.Proxy) and not isinstance(localize, torch.fx.Proxy):
                    fused: Tensor = self.forward_boxes(x, boxes, localize)
                    return fused
                x = self._traced(x, boxes, localize)
        features = self.backbone(x)
        logits: list[Tensor] = []
        for i, head in enumerate(self.heads.values()):
            if i == 0 or self.training:
                logits.append(head(features))
        if not self.training:
            return logits[0]
        for i, backbone in enumerate(self.branch_backbones.values()):
            own = backbone(x)
            for j, head in enumerate(self.heads.values()):
                if j == i + 1:
                    logits[j] = head(own)
        return torch.stack(logits).mean(0)

    def _traced(self, x: Tensor, boxes: Tensor | None, localize: str | None) -> Tensor:
        whole: Tensor = whole_image_only(x, boxes, localize)
        return whole

    @torch.jit.ignore
    def forward_boxes(self, x: Tensor, boxes: Tensor | None, localize: str | None = None) -> Tensor:
        """Fused logits, with the views cut from the normalized batch itself; see `forward`."""
        if localize not in (None, "head") or (boxes is None) == (localize is None):
            raise L2R2Error(f'Pass either boxes or localize="head", got localize={localize!r}.')
        if boxes is None:
            boxes = self.locate(x).in_pixels(x.shape[2], x.shape[3], BOX_THRESHOLD)
        out: L2R2Output = self.forward_views(**batch_views(x, boxes, self.view_spec, self.branches))
        return out.fused

    @torch.jit.ignore
    def locate(self, full: Tensor) -> FoundBoxes:
        """Find the object in full views `[B, C, S, S]` with the box head.

        Raises:
            L2R2Error: when the model has no box head.
        """
        if self.box_head is None:
            raise L2R2Error("This model has no box head; train one with `l2r2 finetune --box-head`, or pass boxes.")
        found: FoundBoxes = self.box_head(features_and_maps(self.backbone_of("full"), full)[1])
        return found

    @torch.jit.ignore
    def segment(self, full: Tensor) -> Tensor:
        """Mask logits `[B, h, w]` of the object in full views `[B, C, S, S]`, from the mask head.

        Raises:
            L2R2Error: when the model has no mask head.
        """
        if self.mask_head is None:
            raise L2R2Error("This model has no mask head; train one with `l2r2 finetune --mask-head`, or pass masks.")
        masks: Tensor = self.mask_head(features_and_maps(self.backbone_of("full"), full, FINER)[1])
        return masks

    @torch.jit.ignore
    def forward_views(
        self,
        full: Tensor | None = None,
        fg: Tensor | None = None,
        has_fg: Tensor | None = None,
        *,
        bg: Tensor | None = None,
        mask: Tensor | None = None,
        objectness: Tensor | None = None,
        full_logits: Tensor | None = None,
    ) -> L2R2Output:
        """Logits of the branches whose view is given, and their fusion (`docs/method.md`, Fallback).

        Args:
            full, fg, bg: normalized views `[B, C, S, S]`, each at its own size.
            has_fg: `[B]` bool, False where no object was found; those rows equal the full branch exactly. None: all found.
            mask: the object in the whole image, for an fg that is masked in the network (`late`, `tokens`): `[B, h, w]` of any
                size (see `masking.coverage`), bool or in [0, 1]. The image is `fg` if given, else `full`. A row whose mask keeps
                nothing counts as not found.
            full_logits: `[B, classes]`, logits of the full branch from an earlier pass, instead of `full`.
            objectness: `[B]` in [0, 1], the boxes' scores, for a fusion that uses them. None: every score is 1.

        Returns:
            L2R2Output of `[B, classes]` logits. With one view given, `fused` is that branch.

        Raises:
            L2R2Error: when a branch is not in the model, no view is given, or the mask does not match.
        """
        views = {"full": full, "fg": fg, "bg": bg}
        known = {} if full_logits is None else {"full": full_logits}
        logits, seen, found = dict(known), None, Found()
        if not known or any(view is not None for view in views.values()):
            others, seen, found = self._branch_logits(views, mask)
            logits.update(others)
        first = next(iter(logits.values()))
        if has_fg is None:
            has_fg = torch.ones(first.shape[0], dtype=torch.bool, device=first.device)
        if seen is not None:
            has_fg = has_fg & seen
        fused = self.fuse(logits, has_fg, objectness)
        return L2R2Output(logits.get("full"), logits.get("fg"), fused, logits.get("bg"), has_fg, None, *found)

    @torch.jit.ignore
    def forward_branches(self, mask: Tensor | None = None, **views: Tensor | None) -> dict[str, Tensor]:
        """Logits `[B, classes]` by branch, for views `[B, C, S, S]` given by branch name; see `forward_views`."""
        return self._branch_logits(views, mask)[0]

    def _branch_logits(self, views: Mapping[str, Tensor | None], mask: Tensor | None) -> tuple[dict[str, Tensor], Any, Found]:
        """Logits by branch, `[B]` bool whether the mask kept anything (or None), and what box head and mask head found."""
        given = {b: v for b, v in views.items() if v is not None}
        if unknown := set(given) - set(self.branches):
            raise L2R2Error(f"This model has the branches {', '.join(self.branches)}, not {', '.join(sorted(unknown))}.")
        if not given:
            raise L2R2Error(f"Pass at least one view of {', '.join(self.branches)}.")
        features, seen = ({}, None) if mask is None else self._masked_features(given, mask)
        pooled, found = self._features({b: v for b, v in given.items() if b not in features})
        features.update(pooled)
        return {b: self.heads[b](features[b]) for b in self.branches if b in features}, seen, found

    def _features(self, views: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Found]:
        """Pooled features by branch, and what the heads found; views of one size share a `[nB, C, S, S]` pass of a backbone."""
        if self.view_spec.patch:
            return native_by_backbone({b: self.backbone_of(b) for b in views}, views), Found()
        groups: list[list[str]] = []
        for branch, view in views.items():
            for names in groups:
                if self.shared and views[names[0]].shape[2:] == view.shape[2:]:
                    names.append(branch)
                    break
            else:
                groups.append([branch])
        pooled: dict[str, Tensor] = {}
        found = Found()
        for names in groups:
            backbone: Any = self.backbone_of(names[0])
            x, sizes = torch.cat([views[b] for b in names]), [views[b].shape[0] for b in names]
            if "full" not in names or (self.box_head is None and self.mask_head is None):
                features = backbone(x)
            else:
                features, maps = features_and_maps(backbone, x, FINER if self.mask_head is not None else 1)
                features, maps = backbone.forward_head(features), [m.split(sizes)[names.index("full")] for m in maps]
                found = Found.by(self.box_head, self.mask_head, maps)
            pooled.update(zip(names, features.split(sizes)))
        return pooled, found

    def _masked_features(self, given: Mapping[str, Tensor], mask: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The fg features of the object in the whole image; late masking gives those of `full` in the same pass."""
        spec = self.view_spec
        if not self.takes_mask:
            raise L2R2Error(f'A mask needs an fg branch of mode "late" or "tokens"; this model has "{spec.fg_mode}".')
        if (image := given.get("fg", given.get("full"))) is None:
            raise L2R2Error("A mask needs the whole image; pass it as full, or as fg.")
        mask = check_mask(mask, image.shape[0]).to(image.device)
        backbone = self.backbone_of("fg")
        if spec.fg.drops_tokens:
            masked, seen = token_features(backbone, image, mask, spec.coverage)
            return {"fg": masked}, seen
        whole, masked, seen = late_features(backbone, image, mask, spec)
        return {"fg": masked, **({"full": whole} if self.shared and "fg" not in given else {})}, seen

    @torch.jit.ignore
    def fuse(self, logits: Mapping[str, Tensor], has_fg: Tensor | None = None, objectness: Tensor | None = None) -> Tensor:
        """Fuse stored branch logits `[B, classes]` as `forward_views` does; see `fuse_branches`."""
        return fuse_branches(self.fusion, logits, has_fg, objectness)

    @property
    def takes_mask(self) -> bool:
        """Whether `forward_views` needs the object's mask, because fg is masked inside the network."""
        return "fg" in self.branches and self.view_spec.fg.takes_mask

    @torch.jit.ignore
    def extra_losses(self, out: L2R2Output, views: Mapping[str, Tensor], weights: PartWeights) -> dict[str, Tensor]:
        """Additional training losses by name, besides the branches' cross-entropies; none for most models."""
        return {}

    @torch.jit.ignore
    def after_training(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Hook that is called once after training with the training views, without augmentation; does nothing by default."""

    @property
    def view_spec(self) -> ViewSpec:
        """How this model's views are cut; stored in the checkpoint."""
        own = {"size": side} if isinstance(side := self.backbone_kwargs.get("img_size"), int) else {}
        cfg = self.pretrained_cfg or self.backbone.pretrained_cfg  # the constructor runs before timm sets our own
        return self._view_spec or ViewSpec.from_pretrained_cfg(cfg, fg_mode=self._fg_mode, **own)

    @view_spec.setter
    def view_spec(self, spec: ViewSpec) -> None:
        self._check_views(spec)
        self._view_spec = spec

    def _check_views(self, spec: ViewSpec) -> None:
        """Check that the backbone takes views of this size and supports the spec's fg mode."""
        check_view_sizes(self.backbone, self.backbone_name, [spec.size_of(branch) for branch in self.branches])
        check_native_backbone(self.backbone, self.backbone_name, spec)
        check_heads(self.box_head, self.mask_head, self.branches, spec)
        if spec.fg.finds_object:
            raise L2R2Error('fg_mode "parts" is only for iFAM models, which find the parts of an object; choose another mode.')
        if "fg" in self.branches and spec.fg.drops_tokens:
            check_tokens_backbone(self.backbone_of("fg"), self.backbone_name)
        if "fg" in self.branches and spec.fg_mode == "late":
            check_late_backbone(self.backbone_of("fg"), self.backbone_name, spec)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments, besides the classes, that rebuild this model; stored in a checkpoint's config."""
        views = self.view_spec.to_dict()
        ours = {"branches": list(self.branches), "shared": self.shared, "fusion": self.fusion.config(), "views": views}
        heads = {"box_head": self.box_head is not None, "mask_head": self.mask_head is not None}
        more = {**heads, "prototype_dim": self.prototype_dim}
        return {**self.backbone_kwargs, **ours, **{name: value for name, value in more.items() if value}}

    def intervene(self, drop_parts: Iterable[int] = (), token_quantile: float = 0.0) -> None:
        """See `IFAM.intervene`; other models raise an `L2R2Error`."""
        raise L2R2Error("Only iFAM models have parts and token quantiles to intervene on; load one of them.")

    def interventions(self) -> dict[str, Any]:
        """The arguments of `intervene` that are in effect; empty for models without parts."""
        return {}

    def backbone_of(self, branch: str) -> nn.Module:
        """The backbone that sees a branch's view."""
        own: nn.Module = self.branch_backbones[branch] if branch in self.branch_backbones else self.backbone  # noqa: SIM401  (no get)
        return own

    def backbone_prefixes(self) -> list[str]:
        """Prefixes of the backbones' keys in the state dict."""
        return ["backbone.", *(f"branch_backbones.{b}." for b in self.branch_backbones)]

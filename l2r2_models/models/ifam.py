"""iFAM: a ViT that finds the parts of the object, and a second stage that sees only these."""

# no `from __future__ import annotations`: see l2r2.py

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from timm.models import NaFlexVit
from torch import Tensor, nn

from ..errors import L2R2Error
from ..views import ViewSpec, batch_masks
from .ifam_script import ScriptedIFAM
from .l2r2 import L2R2, L2R2Output
from .masking import (
    Embedded,
    check_mask,
    check_tokens_backbone,
    embed_tokens,
    kept_patches,
    patch_grid,
    pool_tokens,
    run_all,
    run_tokens,
)
from .parts import PartDiscovery, PartMaps, PartWeights, part_losses


class IFAM(L2R2):
    """Two-stage ViT with hard masks, an `L2R2` whose fg branch finds the object itself.

    Stage 1 is the branch `full`: it sees the whole image, finds K parts and classifies from them. Stage 2 is the branch `fg`: it
    sees the same image without the patches that belong to no part, which are dropped before its first block. Training needs only
    images and labels; boxes and masks are not used, unless a mask is passed explicitly. The prediction, also of `model(x)`, is
    the fusion of both stages, by default stage 2 wherever it sees a patch (`robust` with threshold 0). Evaluation is
    deterministic. A traced, compiled, exported or scripted model runs stage 2 on all tokens with masked keys.

    Source: iFAM (Aniraj et al. 2025); see `docs/method.md`, iFAM.

    Args:
        backbone: a timm ViT, Eva (EVA-02, DINOv3, PE spatial) or NaFlexViT; see `masking.check_tokens_backbone`.
        num_classes: see `L2R2`.
        in_chans: see `L2R2`.
        branches: must be (full, fg).
        fusion: see `L2R2`; `robust` without a threshold gets threshold 0.
        num_parts: number of parts K.
        part_dropout: probability that stage 1 ignores a part in training.
        **options: other arguments of `L2R2`, and of the backbone; `shared=False` gives stage 2 its own ViT.

    Raises:
        L2R2Error: when the backbone, branches, fusion or views are not valid.

    >>> model = IFAM("vit_tiny_patch16_224", num_classes=10, num_parts=4).eval()
    >>> model.forward_views(full=torch.rand(1, 3, 224, 224)).parts.maps.shape
    torch.Size([1, 5, 14, 14])
    """

    fresh = ("fusion.", "parts.", "heads.full.")
    finds_object = True

    def __init__(
        self,
        backbone: str = "vit_small_patch14_reg4_dinov2",
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        branches: str | Sequence[str] = ("full", "fg"),
        fusion: str | Mapping[str, Any] = "robust",
        num_parts: int = 8,
        part_dropout: float = 0.3,
        **options: Any,
    ) -> None:
        if tuple(branches) != ("full", "fg"):
            raise L2R2Error(f"The branches of an iFAM model are full (stage 1) and fg (stage 2), not {branches}.")
        if options.get("prototype_dim"):
            raise L2R2Error("The heads of an iFAM model classify parts, so they are linear; leave prototype_dim out.")
        config = with_threshold({"name": fusion} if isinstance(fusion, str) else fusion)
        if options.get("views") is None:
            options.setdefault("fg_mode", "parts")
        super().__init__(backbone, num_classes, in_chans, fusion=config, **options)
        self.parts = PartDiscovery(self.num_features, num_parts, part_dropout)
        self.parts.to(device=options.get("device"), dtype=options.get("dtype"))
        self.part_dropout = part_dropout
        self.dropped_parts: tuple[int, ...] = ()
        self.token_quantile = 0.0

    # ---- the two stages ----

    def forward(self, x: Tensor, boxes: Optional[Tensor] = None, localize: Optional[str] = None) -> Tensor:  # noqa: UP045
        """Fused logits `[B, classes]` of normalized images, or in training the mean of both stages.

        Args:
            x: images `[B, C, H, W]`.
            boxes: `[B, 4]` xyxy in pixels of `x`; stage 2 then sees what is inside the box, and nothing in a NaN row.
            localize: must be None.

        Raises:
            L2R2Error: when `localize` is given, or a shape is not valid.
        """
        if isinstance(x, torch.fx.Proxy):
            x, boxes, localize = self._traced(x, boxes, localize), None, None
        if localize is not None:
            raise L2R2Error("An iFAM model finds the object itself; do not pass localize.")
        mask, has_fg = (None, None) if boxes is None else batch_masks(x, boxes)
        out = self.forward_views(x, has_fg=has_fg, mask=mask)
        return torch.stack([out.full, out.fg]).mean(0) if self.training else out.fused  # type: ignore[list-item]

    def forward_views(
        self,
        full: Tensor | None = None,
        fg: Tensor | None = None,
        has_fg: Tensor | None = None,
        *,
        bg: Tensor | None = None,
        mask: Tensor | None = None,
        objectness: Tensor | None = None,
    ) -> L2R2Output:
        """Logits of both stages, their fusion, and the parts.

        Args:
            full: normalized images `[B, C, S, S]`.
            fg: must be None; stage 2 sees `full`.
            has_fg: `[B]` bool, False in rows where stage 2 should be ignored.
            bg: must be None.
            mask: `[B, h, w]`, bool or in [0, 1]: what stage 2 sees instead of the parts.
            objectness: `[B]` in [0, 1], see `L2R2.forward_views`.

        Returns:
            L2R2Output; `has_fg` is False where stage 2 kept no patch.

        Raises:
            L2R2Error: when `full` is missing, another view is given, or a side is not a multiple of the patch size.
        """
        if full is None or fg is not None or bg is not None:
            raise L2R2Error("An iFAM model finds the object itself; pass only the whole image, as full.")
        grid = patch_grid(self.backbone, full.shape[-2], full.shape[-1])
        embedded, found = self._stage1(full, grid)
        found = self._intervened(found)
        z_full = self.parts.classify(found.vectors, self.heads["full"], self.dropped_parts)
        if mask is not None:
            keep = kept_patches(check_mask(mask, full.shape[0]).to(full.device), grid, self.view_spec.coverage)
            found = found._replace(keep=keep.unflatten(1, grid))
        if not self.shared:
            embedded = embed_tokens(self.backbone_of("fg"), full)
        z_fg, seen = self._stage2(embedded, found, by_hand=mask is not None)
        seen = seen if has_fg is None else seen & has_fg
        fused = self.fuse({"full": z_full, "fg": z_fg}, seen, objectness)
        return L2R2Output(z_full, z_fg, fused, None, seen, found)

    def forward_branches(self, mask: Tensor | None = None, **views: Tensor | None) -> dict[str, Tensor]:
        """Logits `[B, classes]` of both stages by branch; see `forward_views`."""
        return self.forward_views(mask=mask, **views).branches()

    def find_parts(self, x: Tensor) -> PartMaps:
        """Run stage 1 alone: the parts in images `[B, C, H, W]`, after the current interventions."""
        return self._intervened(self._stage1(x, patch_grid(self.backbone, x.shape[-2], x.shape[-1]))[1])

    def _intervened(self, found: PartMaps) -> PartMaps:
        if not self.dropped_parts and not self.token_quantile:
            return found
        return self.parts.without(found, self.dropped_parts, self.token_quantile)

    def _stage1(self, x: Tensor, grid: tuple[int, int]) -> tuple[Embedded, PartMaps]:
        """The tokens before the first block, and the parts."""
        vit = self.backbone
        embedded = embed_tokens(vit, x)
        return embedded, self.parts(run_all(vit, embedded)[:, vit.num_prefix_tokens :], grid)

    def _stage2(self, embedded: Embedded, found: PartMaps, *, by_hand: bool) -> tuple[Tensor, Tensor]:
        """Stage 2's logits, and `[B]` bool whether it saw a patch.

        In training each patch is weighted as a key (and in the mean), by 1 if it is kept and 0 if not, with the gradient of the
        foreground map (straight-through), so that the loss of stage 2 reaches dropped patches too. The weight is not applied to
        the token itself, because the norm before the first attention would cancel it.
        """
        vit, keep, weights = self.backbone_of("fg"), found.keep.flatten(1), None
        if self.training and not by_hand:
            soft = found.foreground().flatten(1)
            weights = keep + (soft - soft.detach())
        seen = run_tokens(vit, embedded, keep, weights=weights)
        return self.heads["fg"](pool_tokens(vit, seen)), keep.any(1)

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that `torch.jit.script` compiles instead of this one.

        Raises:
            L2R2Error: when an intervention is set, or the network is a NaFlexViT, which timm cannot script.
        """
        if isinstance(self.backbone, NaFlexVit):
            raise L2R2Error(f"{self.backbone_name} cannot be scripted by torch.jit; use torch.export or `l2r2 export`.")
        if self.interventions():
            raise L2R2Error("A scripted model does not support interventions; call intervene() without arguments first.")
        first, second = self.backbone_of("full"), self.backbone_of("fg")
        return ScriptedIFAM(first, second, self.parts, self.heads["full"], self.heads["fg"], self.fusion)

    # ---- interventions ----

    def intervene(self, drop_parts: Iterable[int] = (), token_quantile: float = 0.0) -> None:
        """Remove parts or low-confidence patches in all later forward passes; without arguments, undo this.

        Args:
            drop_parts: indices of the parts to remove, 0 to K - 1.
            token_quantile: remove patches whose logit is below this quantile of their part's training logits; 0 removes none.

        Raises:
            L2R2Error: when a part is unknown, all parts are removed, the quantile is outside [0, 1], or the checkpoint has no
                quantiles.
        """
        drop_parts = tuple(drop_parts)
        if wrong := [k for k in drop_parts if isinstance(k, bool) or not isinstance(k, int)]:
            raise L2R2Error(f"Parts must be given by their indices, got {wrong[0]!r}.")
        parts = tuple(sorted(set(drop_parts)))
        self.parts.check_intervention(parts, token_quantile)
        self.dropped_parts, self.token_quantile = parts, token_quantile

    @contextmanager
    def intervened(self, drop_parts: Iterable[int] = (), token_quantile: float = 0.0) -> Iterator["IFAM"]:
        """`intervene` within a `with` block; see `intervene` for the arguments and errors."""
        before = self.dropped_parts, self.token_quantile
        self.intervene(drop_parts, token_quantile)
        try:
            yield self
        finally:
            self.dropped_parts, self.token_quantile = before

    def interventions(self) -> dict[str, Any]:
        """The arguments of `intervene` that are in effect; empty without interventions."""
        given = {"drop_parts": list(self.dropped_parts), "token_quantile": self.token_quantile}
        return {name: value for name, value in given.items() if value}

    @torch.jit.ignore
    def extra_losses(self, out: L2R2Output, views: Mapping[str, Tensor], weights: PartWeights) -> dict[str, Tensor]:
        """The losses on the parts, see `part_losses`."""
        assert out.parts is not None
        return part_losses(out.parts, weights, views["full"], self.find_parts)

    @torch.jit.ignore
    def after_training(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Store the quantiles of the part logits over the training images."""
        self.store_quantiles(batch["full"] for batch in batches)

    @torch.no_grad()
    def store_quantiles(self, images: Iterable[Tensor]) -> None:
        """Store the quantiles that `intervene(token_quantile=...)` needs, from training images `[B, C, S, S]`."""
        training = self.training
        self.eval()
        self.parts.store_quantiles(self.find_parts(x) for x in images)
        self.train(training)

    # ---- what differs from L2R2 ----

    def _check_views(self, spec: ViewSpec) -> None:
        if not spec.fg.finds_object:
            raise L2R2Error(f'An iFAM model finds the object itself: its fg_mode must be "parts", got "{spec.fg_mode}".')
        for branch in self.branches:
            check_tokens_backbone(self.backbone_of(branch), self.backbone_name)

    def arguments(self) -> dict[str, Any]:
        """See `L2R2.arguments`."""
        return {**super().arguments(), "num_parts": self.parts.num_parts, "part_dropout": self.part_dropout}

    @torch.jit.ignore
    def prune_intermediate_layers(self, indices: Any = 1, prune_norm: bool = False, prune_head: bool = True) -> Any:
        """See `TimmContract.prune_intermediate_layers`."""
        if prune_head:
            self.parts = None  # type: ignore[assignment]
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _unfitted(self) -> dict[str, Any]:
        return with_threshold(super()._unfitted())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Stage 1's logits from the backbone's tokens, or with `pre_logits` its pooled features."""
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        patches = x[:, self.backbone.num_prefix_tokens :]
        return self.parts.classify(self.parts(patches, (patches.shape[1], 1)).vectors, self.heads["full"], self.dropped_parts)

    def _new_head(self, branch: str) -> nn.Module:
        head = super()._new_head(branch)
        if branch == "full" and isinstance(head, nn.Linear):
            head.register_parameter("bias", None)  # it would be the same for all parts
        return head


def with_threshold(fusion: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a fusion's config: `robust` without a threshold gets 0, so that stage 2 wins wherever it sees a patch.

    >>> with_threshold({"name": "robust"})
    {'threshold': 0.0, 'name': 'robust'}
    """
    return {**({"threshold": 0.0} if fusion.get("name") == "robust" else {}), **fusion}

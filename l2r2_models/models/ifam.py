"""iFAM: a ViT that finds the parts of the object, and a second pass that sees nothing but these."""

# no `from __future__ import annotations`: see model.py

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from ..errors import L2R2Error
from ..views import ViewSpec, batch_masks
from .ifam_script import ScriptedIFAM
from .l2r2 import L2R2, L2R2Output
from .masking import check_mask, check_tokens_backbone, embed_tokens, kept_patches, patch_grid, pool_tokens, run_tokens
from .parts import PartDiscovery, PartMaps, PartWeights, part_losses


class IFAM(L2R2):
    """Two-stage ViT with hard masks (iFAM, METHOD.md 8), as an `L2R2` whose fg branch finds its object itself.

    Stage 1 is the branch `full`: it sees the whole image, finds K parts and answers from them. Stage 2 is the branch `fg`: the
    same images again, without the patches that belong to no part; they are dropped before its first block. Nothing but images
    and labels is needed; boxes and masks are not used unless a mask is given by hand. The answer, also that of `model(x)`, is
    the fusion of both, by default stage 2 wherever it sees anything (`robust` with threshold 0). In evaluation there is no
    noise: the same image gives the same answer.

    A traced, compiled, exported or scripted model runs stage 2 on all tokens with masked keys.

    Args:
        backbone: a plain timm ViT.
        num_classes, in_chans, shared, views, drop_rate: see `L2R2`; `shared=False` gives stage 2 its own ViT.
        branches: (full, fg), the only choice.
        fusion: see `L2R2`; a `robust` without a threshold gets 0.
        num_parts: K.
        part_dropout: probability that a part has no say in stage 1's answer in training.
        **backbone_kwargs: passed on to the backbone.

    Raises:
        L2R2Error: see `L2R2`.
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
            raise L2R2Error(f"The branches of an ifam model are full (stage 1) and fg (stage 2), not {branches}.")
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
        """Logits `[B, classes]` of normalized images `[B, C, H, W]`: the fused answer, in training the mean of both stages.

        With `boxes` (`[B, 4]` xyxy in pixels of x; a NaN row has none) stage 2 sees what is inside of the box instead.
        """
        if isinstance(x, torch.fx.Proxy):
            x, boxes, localize = self._traced(x, boxes, localize), None, None
        if localize is not None:
            raise L2R2Error("An ifam model finds its object itself; leave localize out.")
        mask, has_fg = (None, None) if boxes is None else batch_masks(x, boxes)
        out = self.forward_views(x, has_fg=has_fg, mask=mask)
        return torch.stack([out.full, out.fg]).mean(0) if self.training else out.fused  # type: ignore[list-item]

    def forward_views(  # type: ignore[override]
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
            fg, bg: none; stage 2 sees `full`.
            has_fg: `[B]` bool, False where stage 2 is not to be asked.
            mask: `[B, h, w]`, bool or in 0..1: what stage 2 sees instead of the parts.
            objectness: `[B]` in [0, 1], see `L2R2.forward_views`.

        Returns:
            L2R2Output; `has_fg` is False where stage 2 kept no patch.

        Raises:
            L2R2Error: no whole image, other views, or a side that is not a multiple of the patch size.
        """
        if full is None or fg is not None or bg is not None:
            raise L2R2Error("An ifam model looks for the object itself: give the whole image as full, and nothing else.")
        grid = patch_grid(self.backbone, full.shape[-2], full.shape[-1])
        tokens, found = self._stage1(full, grid)
        found = self._intervened(found)
        z_full = self.parts.answer(found.vectors, self.heads["full"], self.dropped_parts)
        if mask is not None:
            keep = kept_patches(check_mask(mask, full.shape[0]).to(full.device), grid, self.view_spec.coverage)
            found = found._replace(keep=keep.unflatten(1, grid))
        if not self.shared:
            tokens = embed_tokens(self.backbone_of("fg"), full)
        z_fg, seen = self._stage2(tokens, found, by_hand=mask is not None)
        seen = seen if has_fg is None else seen & has_fg
        fused = self.fuse({"full": z_full, "fg": z_fg}, seen, objectness)
        return L2R2Output(z_full, z_fg, fused, None, seen, found)

    def forward_branches(self, mask: Tensor | None = None, **views: Tensor | None) -> dict[str, Tensor]:
        """Logits `[B, classes]` of `full` and `fg`; see `forward_views`."""
        return self.forward_views(mask=mask, **views).branches()

    def find_parts(self, x: Tensor) -> PartMaps:
        """Stage 1 alone: the parts in images `[B, C, H, W]`, under the interventions that are set."""
        return self._intervened(self._stage1(x, patch_grid(self.backbone, x.shape[-2], x.shape[-1]))[1])

    def _intervened(self, found: PartMaps) -> PartMaps:
        if not self.dropped_parts and not self.token_quantile:
            return found
        return self.parts.without(found, self.dropped_parts, self.token_quantile)

    def _stage1(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, PartMaps]:
        """The tokens that enter the first block, and the parts."""
        vit = self.backbone
        tokens = embed_tokens(vit, x)
        features = vit.norm(checkpoint_seq(vit.blocks, tokens) if vit.grad_checkpointing else vit.blocks(tokens))
        return tokens, self.parts(features[:, vit.num_prefix_tokens :], grid)

    def _stage2(self, tokens: Tensor, found: PartMaps, *, by_hand: bool) -> tuple[Tensor, Tensor]:
        """Stage 2's logits, and `[B]` bool whether it saw a patch.

        In training every patch has a weight as a key (and in a mean), 1 if it is kept and 0 if not, whose gradient is that of
        the foreground map (straight-through): the loss of stage 2 tells stage 1 which patches it should have left out, and
        which it should have kept. The weight stands where leaving a patch out acts; a factor of the token itself would be
        canceled by the norm before the first attention.
        """
        vit, keep, weights = self.backbone_of("fg"), found.keep.flatten(1), None
        if self.training and not by_hand:
            soft = found.foreground().flatten(1)
            weights = keep + (soft - soft.detach())
        seen = run_tokens(vit, tokens, keep, weights=weights)
        return self.heads["fg"](pool_tokens(vit, seen)), keep.any(1)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles instead of this module.

        Raises:
            L2R2Error: an intervention is set.
        """
        if self.interventions():
            raise L2R2Error("Parts are left out by `intervene`, which a scripted model does not know; call intervene() first.")
        first, second = self.backbone_of("full"), self.backbone_of("fg")
        return ScriptedIFAM(first, second, self.parts, self.heads["full"], self.heads["fg"], self.fusion)

    # ---- interventions ----

    def intervene(self, drop_parts: Iterable[int] = (), token_quantile: float = 0.0) -> None:
        """From now on: without some parts (by number, 0 to K - 1), and without the patches whose logit is below this quantile of
        their part's logits in training. Without arguments: as before.

        Raises:
            L2R2Error: an unknown part, every part, a quantile outside of 0..1, or a checkpoint that has none.
        """
        drop_parts = tuple(drop_parts)
        if wrong := [k for k in drop_parts if isinstance(k, bool) or not isinstance(k, int)]:
            raise L2R2Error(f"Parts are given by their numbers, got {wrong[0]!r}.")
        parts = tuple(sorted(set(drop_parts)))
        self.parts.check_intervention(parts, token_quantile)
        self.dropped_parts, self.token_quantile = parts, token_quantile

    @contextmanager
    def intervened(self, drop_parts: Iterable[int] = (), token_quantile: float = 0.0) -> Iterator["IFAM"]:
        """`intervene`, for as long as the `with` lasts."""
        before = self.dropped_parts, self.token_quantile
        self.intervene(drop_parts, token_quantile)
        try:
            yield self
        finally:
            self.dropped_parts, self.token_quantile = before

    def interventions(self) -> dict[str, Any]:
        given = {"drop_parts": list(self.dropped_parts), "token_quantile": self.token_quantile}
        return {name: value for name, value in given.items() if value}

    @torch.jit.ignore
    def extra_losses(self, out: L2R2Output, views: Mapping[str, Tensor], weights: PartWeights) -> dict[str, Tensor]:
        """The losses that shape the parts, see `part_losses`."""
        assert out.parts is not None
        return part_losses(out.parts, weights, views["full"], self.find_parts)

    @torch.jit.ignore
    def after_training(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Store the quantiles of the parts' logits over the training images."""
        self.store_quantiles(batch["full"] for batch in batches)

    @torch.no_grad()
    def store_quantiles(self, images: Iterable[Tensor]) -> None:
        """Store the quantiles that `intervened(token_quantile=...)` needs, over training images `[B, C, S, S]`."""
        training = self.training
        self.eval()
        self.parts.store_quantiles(self.find_parts(x) for x in images)
        self.train(training)

    # ---- what differs from L2R2 ----

    def _check_views(self, spec: ViewSpec) -> None:
        if not spec.fg.finds_object:
            raise L2R2Error(f'An ifam model finds its object itself: its fg_mode is "parts", not "{spec.fg_mode}".')
        for branch in self.branches:
            check_tokens_backbone(self.backbone_of(branch), self.backbone_name)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "num_parts": self.parts.num_parts, "part_dropout": self.part_dropout}

    @torch.jit.ignore
    def prune_intermediate_layers(self, indices: Any = 1, prune_norm: bool = False, prune_head: bool = True) -> Any:
        if prune_head:
            self.parts = None  # type: ignore[assignment]
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _unfitted(self) -> dict[str, Any]:
        return with_threshold(super()._unfitted())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Stage 1's answer from the backbone's tokens; with `pre_logits` its pooled features."""
        if pre_logits:
            return self.backbone.forward_head(x, pre_logits=True)
        patches = x[:, self.backbone.num_prefix_tokens :]
        return self.parts.answer(self.parts(patches, (patches.shape[1], 1)).vectors, self.heads["full"], self.dropped_parts)

    def _new_head(self, branch: str) -> nn.Module:
        head = super()._new_head(branch)
        if branch == "full" and isinstance(head, nn.Linear):
            head.register_parameter("bias", None)  # it would be the same for every part
        return head


def with_threshold(fusion: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a fusion; a `robust` without a threshold gets 0, with which stage 2 answers wherever it sees anything."""
    return {**({"threshold": 0.0} if fusion.get("name") == "robust" else {}), **fusion}

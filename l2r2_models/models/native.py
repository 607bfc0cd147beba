"""Views at their own aspect ratio through a NaFlexViT: all branches in one pass, without a padded token in any block.

Source of the network: NaFlexViT in timm, after NaViT (Dehghani et al. 2023); see `docs/method.md`, Views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.models import NaFlexVit
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import L2R2Error
from ..views import ViewSpec
from .masking import Embedded, run_tokens


class Patched(NamedTuple):
    """The patches of views, those of each view first.

    Attributes:
        patches: `[B, N, P * P * C]`, N of the view with the most; 0 beyond a view's own.
        coord: `[B, N, 2]` int64, row and column of each patch; 0 beyond.
        valid: `[B, N]` bool.
    """

    patches: Tensor
    coord: Tensor
    valid: Tensor


def check_native_backbone(backbone: Any, name: str, spec: ViewSpec) -> None:
    """Check that a backbone takes views at their own aspect ratio, if the spec has such.

    Raises:
        L2R2Error: when it is not a NaFlexViT of that patch size with linear patch embedding and absolute positions.
    """
    if not spec.patch:
        return
    reason = ""
    if not isinstance(backbone, NaFlexVit):
        reason = f"its class {type(backbone).__name__} is not timm's NaFlexVit"
    elif backbone.embeds.patch_size != (spec.patch, spec.patch):
        reason = f"its patches have {' x '.join(map(str, backbone.embeds.patch_size))} pixels, not {spec.patch}"
    elif not backbone.embeds.is_linear:
        reason = "it embeds patches by a convolution (embed_proj_type)"
    elif backbone.rope is not None:
        reason = "its rotary embeddings would differ between the views of a batch"
    elif getattr(backbone.patch_drop, "prob", 0):
        reason = "it drops random patches (patch_drop_rate)"
    if reason:
        raise L2R2Error(f"{name} does not take views at their own aspect ratio: {reason}; set patch to 0, or use naflexvit_*.")


def patch_views(vit: Any, views: Tensor) -> Patched:
    """Split views `[B, C, H, W]` into patches; NaN lies beyond a view (`views.native`).

    Raises:
        L2R2Error: when a side is not a multiple of the patch size.
    """
    height, width = vit.embeds.patch_size
    if views.shape[2] % height or views.shape[3] % width:
        sides = f"{views.shape[2]} x {views.shape[3]}"
        raise L2R2Error(f"Views of {sides} pixels do not divide into patches of {height} x {width}; cut them with make_views.")
    patches, (rows, columns) = batch_patchify(
        views.contiguous(), (height, width), pad=False, channels_last=vit.embeds.channels_last
    )
    valid = ~patches[..., 0].isnan()
    coord = torch.cartesian_prod(torch.arange(rows, device=views.device), torch.arange(columns, device=views.device))
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(valid.sum(1).max())]  # a view's own patches first
    valid = valid.gather(1, order)
    patches = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[2]))
    return Patched(torch.where(valid[..., None], patches, 0.0), coord[order] * valid[..., None], valid)


def native_features(vit: Any, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pooled features by branch, of views `[B, C, H, W]` that may have any sizes, in one pass.

    Equal to those that timm's network gives each view alone.

    Args:
        vit: see `check_native_backbone`.
        views: by branch, NaN beyond each view.

    Raises:
        L2R2Error: see `patch_views`, and `run_tokens`.
    """
    each = [patch_views(vit, view) for view in views.values()]
    most = max(part.valid.shape[1] for part in each)
    patches = torch.cat([pad(part.patches, (0, 0, 0, most - part.valid.shape[1])) for part in each])
    coord = torch.cat([pad(part.coord, (0, 0, 0, most - part.valid.shape[1])) for part in each])
    valid = torch.cat([pad(part.valid, (0, most - part.valid.shape[1])) for part in each])
    embedded = vit._forward_embeds(patches, coord, valid, valid)["patches"]  # no attention mask is made if there is one
    tokens = run_tokens(vit, Embedded(embedded), valid)
    pooled = vit.forward_head(torch.cat([tokens.prefix, tokens.patches], 1), pre_logits=True, patch_valid=valid)
    return dict(zip(views, pooled.split([len(part.valid) for part in each])))


def native_by_backbone(backbones: Mapping[str, nn.Module], views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`native_features` with the backbone of each branch; branches that share one take one pass."""
    found: dict[str, Tensor] = {}
    for vit in {id(backbones[branch]): backbones[branch] for branch in views}.values():
        found.update(native_features(vit, {branch: view for branch, view in views.items() if backbones[branch] is vit}))
    return found

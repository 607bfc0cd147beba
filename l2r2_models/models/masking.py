"""Masking inside the network: late masking of features, and token masks that remove patches from a ViT's attention.

Source: Aniraj et al. 2023; see `docs/method.md`, Masking inside the network.
"""

# no `from __future__ import annotations`: see l2r2.py

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from l2r2_kernels import run_masked, run_packed
from timm.layers import PatchEmbed
from timm.models import Eva, NaFlexVit, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..errors import L2R2Error
from ..views import ViewSpec
from .backbones import feature_info
from .packed_graphs import graphs_of


class Tokens(NamedTuple):
    """A ViT's tokens after its last norm.

    Attributes:
        prefix: `[B, P, C]`, class and register tokens.
        patches: `[B, N, C]`; dropped patches are 0 unless there are weights.
        keep: `[B, N]` bool.
        weights: `[B, N]`, the weight of each patch in a mean (see `run_tokens`), or None.
    """

    prefix: Tensor
    patches: Tensor
    keep: Tensor
    weights: Tensor | None = None


class Embedded(NamedTuple):
    """A ViT's tokens as they enter the first block.

    Attributes:
        tokens: `[B, P + N, C]`, prefix first, with absolute positions added.
        rope: the rotary embeddings of the patches, as the blocks take them; None without.
    """

    tokens: Tensor
    rope: Tensor | None = None


# ---- masks on a grid ----


def check_mask(mask: Tensor, batch: int) -> Tensor:
    """Convert an object mask to float `[B, h, w]`.

    Raises:
        L2R2Error: when the mask is not `[B, h, w]`, or has values that are not in [0, 1] (such as an image file's 255).
    """
    if mask.ndim != 3 or mask.shape[0] != batch:
        raise L2R2Error(f"A mask must be [B, h, w] with B = {batch} images, got {list(mask.shape)}.")
    if mask.dtype != torch.bool and not torch.compiler.is_compiling() and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise L2R2Error("Mask values must be finite and in [0, 1]; true or 1 marks the object.")
    return mask if mask.is_floating_point() else mask.float()


def coverage(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a mask to a grid, as its mean over each cell; a mask that already has that size is returned as is.

    All masks inside the network are resized by this function.

    Args:
        mask: `[B, h, w]` in [0, 1].
        grid: `(rows, columns)`.

    Returns:
        `[B, rows, columns]` float in [0, 1].

    >>> coverage(torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), (1, 1))
    tensor([[[0.7500]]])
    """
    return mask if tuple(mask.shape[1:]) == grid else nn.functional.adaptive_avg_pool2d(mask[:, None], grid)[:, 0]


def kept_patches(mask: Tensor, grid: tuple[int, int], threshold: float) -> Tensor:
    """`[B, N]` bool: the patches of which a mask `[B, h, w]` covers at least the fraction `threshold`, and more than 0."""
    covered = coverage(mask, grid).flatten(1)
    return (covered >= threshold) & (covered > 0)


# ---- tokens ----


def check_tokens_backbone(backbone: nn.Module, name: str) -> None:
    """Check that a backbone supports token masks.

    Raises:
        L2R2Error: when it is not a plain ViT, Eva or NaFlexViT that pools by its class token or the mean.
    """
    reason = ""
    family = next((kind for kind in (VisionTransformer, Eva, NaFlexVit) if isinstance(backbone, kind)), None)
    if family is None:
        reason = (
            f"its class {type(backbone).__name__} is none of timm's VisionTransformer, Eva (EVA-02, DINOv3, PE) and NaFlexVit"
        )
    elif any(getattr(type(backbone), m) is not getattr(family, m) for m in ("forward_features", "forward_head")):
        reason = f"its class {type(backbone).__name__} changes the forward pass of timm's {family.__name__}"
    elif backbone.global_pool not in ("token", "avg"):
        reason = f'its pooling "{backbone.global_pool}" is neither the class token nor the mean'
    elif family is not NaFlexVit and not isinstance(backbone.patch_embed, PatchEmbed):
        reason = f"its {type(backbone.patch_embed).__name__} mixes patches before they can be dropped"
    elif getattr(backbone.patch_drop, "prob", 0):
        reason = "it drops random patches (patch_drop_rate), so a mask would no longer match"
    if reason:
        raise L2R2Error(f'{name} cannot drop tokens: {reason}; choose fg_mode "late" or "masked_crop".')


def patch_grid(vit: Any, height: int, width: int) -> tuple[int, int]:
    """The patch grid `(rows, columns)` of an image.

    Raises:
        L2R2Error: when a side is not a multiple of the patch size.
    """
    embed = vit.embeds if isinstance(vit, NaFlexVit) else vit.patch_embed
    grid: tuple[int, int] = _grid(embed.patch_size, height, width)
    return grid


@torch.fx.wrap
@torch.jit.ignore
def _grid(patch_size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    rows, columns = patch_size
    for side, patch in ((height, rows), (width, columns)):
        if side % patch:
            near = (side // patch + 1) * patch
            raise L2R2Error(f"A side of {side} pixels does not divide into patches; use a multiple of {patch}, e.g. {near}.")
    return height // rows, width // columns


def embed_tokens(vit: Any, x: Tensor) -> Embedded:
    """Embed images `[B, C, H, W]` as tokens for the first block; see `check_tokens_backbone` for `vit`."""
    if isinstance(vit, NaFlexVit):
        parts = vit._forward_embeds(x, None, None, None)
        return Embedded(parts["patches"], parts["rope_embeds"])
    embedded = vit._pos_embed(vit.patch_embed(x))
    tokens, rope = embedded if isinstance(vit, Eva) else (embedded, None)
    return Embedded(vit.norm_pre(tokens), rope)


def run_all(vit: Any, embedded: Embedded) -> Tensor:
    """Run the blocks and the last norm of a ViT on all tokens, as its own forward pass does: `[B, P + N, C]`."""
    tokens, rope = embedded
    by_block = [rope] * len(vit.blocks) if rope is None or rope.ndim < 4 else rope  # a mixed embedding has one per block
    for i, block in enumerate(vit.blocks):
        inputs = (tokens,) if rope is None else (tokens, by_block[i])
        tokens = recompute(block, *inputs, use_reentrant=False) if vit.grad_checkpointing else block(*inputs)
    normed: Tensor = vit.norm(tokens)
    return normed


def run_tokens(vit: Any, embedded: Embedded, keep: Tensor, *, packed: bool = True, weights: Tensor | None = None) -> Tokens:
    """Run the blocks and the last norm of a ViT with dropped patches as keys in no block.

    Args:
        vit: see `check_tokens_backbone`.
        embedded: from `embed_tokens`.
        keep: `[B, N]` bool. Prefix tokens (class, registers) are always kept.
        packed: whether to drop the tokens before block 1, or to compute all and mask dropped ones as keys. Both give the
            same prefix and kept patches; the first is faster. A traced, compiled or exported model always does the second, whose
            shapes do not depend on the mask.
        weights: `[B, N]`, a straight-through mask that is 1 for kept and 0 for dropped patches: the weight of each patch as a key
            and in the mean. It changes no value, but its gradient reaches dropped patches too, so all tokens are computed.

    Returns:
        The tokens after the last norm.

    Raises:
        L2R2Error: when a block is not supported, or the model is traced by `torch.jit`.
    """
    if torch.jit.is_tracing():  # the trace would bake in this mask, and give NaN for others
        raise L2R2Error("A network that drops tokens cannot be traced by torch.jit; use torch.export or `l2r2 export`.")
    tokens, rope = embedded
    prefixes = vit.num_prefix_tokens
    weight = None if weights is None else nn.functional.pad(weights, (prefixes, 0), value=1.0)
    mask = torch.cat([keep.new_ones(keep.shape[0], prefixes), keep], 1)
    try:
        if packed and weights is None and not _is_traced(tokens):
            out = _run_packed(vit, tokens, mask, rope)
        elif weight is not None and not _is_traced(tokens) and (graphs := graphs_of(vit, tokens)) and graphs.training:
            out = graphs.run_masked(tokens, mask, weight, rope)
        else:
            checkpoint = bool(vit.grad_checkpointing)
            out = run_masked(vit.blocks, tokens, mask, num_prefix=prefixes, key_weight=weight, checkpoint=checkpoint, rope=rope)
    except TypeError as error:
        raise L2R2Error(f"{type(vit).__name__} cannot drop tokens: {error}") from error
    out = vit.norm(out)
    patches = out[:, prefixes:]
    return Tokens(out[:, :prefixes], patches if weights is not None else torch.where(keep[:, :, None], patches, 0), keep, weights)


def _run_packed(vit: Any, tokens: Tensor, mask: Tensor, rope: Tensor | None) -> Tensor:
    """The blocks on kept tokens; dropped ones are 0 in the result `[B, P + N, C]`."""
    if (graphs := graphs_of(vit, tokens)) is not None:
        return graphs.run(tokens, mask, rope)
    capacity = None if mask.device.type == "cpu" else "sync"  # one synchronization, without which packing does not pay off
    options = {"num_prefix": vit.num_prefix_tokens, "checkpoint": bool(vit.grad_checkpointing)}
    _, out = run_packed(vit.blocks, tokens, mask, capacity=capacity, unpacked=True, rope=rope, **options)
    assert out is not None
    return out


def _is_traced(tokens: Tensor) -> bool:
    """Whether shapes must not depend on the mask: under FX, torch.compile or torch.export, and on the meta device."""
    return isinstance(tokens, torch.fx.Proxy) or tokens.is_meta or torch.compiler.is_compiling()


def pool_tokens(vit: Any, tokens: Tokens) -> Tensor:
    """Pooled features `[B, C]` after the head norm: the class token, or the (weighted) mean of kept patches."""
    if vit.global_pool == "token":
        pooled = tokens.prefix[:, 0]
    else:
        patches, count = tokens.patches, tokens.keep.sum(1, keepdim=True)
        if tokens.weights is not None:
            weights = tokens.weights.to(patches.dtype)
            patches, count = patches * weights[..., None], weights.sum(1, keepdim=True)
        pooled = patches.sum(1)
        if getattr(vit, "pool_include_prefix", False):
            pooled, count = pooled + tokens.prefix.sum(1), count + tokens.prefix.shape[1]
        pooled = pooled / count.clamp_min(1)
    features: Tensor = vit.head_drop(vit.fc_norm(pooled))
    return features


def token_features(vit: Any, x: Tensor, mask: Tensor, threshold: float, *, packed: bool = True) -> tuple[Tensor, Tensor]:
    """Pooled features of the patches that a mask covers.

    Args:
        vit: see `check_tokens_backbone`.
        x: images `[B, C, H, W]`.
        mask: `[B, h, w]` in [0, 1].
        threshold: minimum fraction of a patch that the mask must cover.
        packed: see `run_tokens`.

    Returns:
        Features `[B, C]`, and `[B]` bool whether any patch was kept; if none was, the features are those of the whole image.

    Raises:
        L2R2Error: when a side is not a multiple of the patch size, or `run_tokens` raises it.
    """
    keep = kept_patches(mask, patch_grid(vit, *x.shape[-2:]), threshold)
    seen = keep.any(1)
    tokens = run_tokens(vit, embed_tokens(vit, x), keep | ~seen[:, None], packed=packed)
    return pool_tokens(vit, tokens), seen


# ---- late masking ----


def check_late_backbone(backbone: nn.Module, name: str, spec: ViewSpec) -> None:
    """Check that a backbone supports the late masking of `spec`.

    Raises:
        L2R2Error: when it does not support the requested pooling.
    """
    tokens = hasattr(backbone, "fc_norm") and hasattr(backbone, "num_prefix_tokens")
    if not tokens and not hasattr(backbone, "forward_head"):
        raise L2R2Error(f"{name} cannot be masked late: it has no features before its head; choose another fg_mode.")
    if spec.late_pool == "token":
        if not tokens or not backbone.num_prefix_tokens:
            raise L2R2Error(f'{name} has no class token; choose late_pool "mask" or "all".')
        if spec.late_stage == "last":
            raise L2R2Error('After the last stage a mask does not change the class token; choose late_stage "before_last".')
    kinds = {str(m.pool_type) for m in backbone.modules() if isinstance(getattr(m, "pool_type", None), str)} - {""}
    if spec.late_pool == "mask" and not tokens and not kinds <= {"avg", "fast"}:
        raise L2R2Error(f'{name} pools by {", ".join(sorted(kinds))}, which has no masked mean; choose late_pool "all".')


def late_features(backbone: Any, x: Tensor, mask: Tensor, spec: ViewSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features of the whole image and of the object in one pass.

    Late masking does not remove the background that the features have already mixed in.

    Args:
        backbone: any timm model with 4-D features or ViT tokens.
        x: images `[B, C, H, W]`.
        mask: `[B, h, w]` in [0, 1].
        spec: only its `late_stage` and `late_pool` are used.

    Returns:
        full `[B, C]`, fg `[B, C]`, and `[B]` bool whether the mask has an object; if it has none, fg equals the whole image's.

    Raises:
        L2R2Error: when the backbone's features do not form a grid over the image, or its last stage cannot be masked.
    """
    seen = (mask > 0).flatten(1).any(1)
    mask = torch.where(seen[:, None, None], mask, 1.0)
    # a ViT's grid is inferred from the mask's aspect ratio
    if hasattr(backbone, "num_prefix_tokens") and mask.shape[1] * x.shape[3] != mask.shape[2] * x.shape[2]:
        mask = coverage(mask, (x.shape[2], x.shape[3]))
    if spec.late_stage == "last":
        features = backbone.forward_features(x)
        full = backbone.forward_head(features, pre_logits=True)
        return full, _pool_masked(backbone, _times(backbone, features, mask), mask, spec.late_pool), seen
    with _doubled_before_last_stage(backbone, mask) as done:
        features = backbone.forward_features(x)
    name = type(backbone).__name__
    if backbone.training and getattr(backbone, "grad_checkpointing", False):  # recomputation runs without the hook
        raise L2R2Error(f"{name} cannot be masked before its last stage with gradient checkpointing; use one or the other.")
    if not done:
        raise L2R2Error(f'{name} cannot be masked before its last stage, which is not one module; use late_stage "last".')
    whole, masked = features.chunk(2)
    full = backbone.forward_head(whole, pre_logits=True)
    if spec.late_pool == "mask":
        masked = _times(backbone, masked, mask)
    if spec.late_pool == "token" or (spec.late_pool == "all" and masked.ndim == 4):
        return full, backbone.forward_head(masked, pre_logits=True), seen
    return full, _pool_masked(backbone, masked, mask, spec.late_pool), seen


@contextmanager
def _doubled_before_last_stage(backbone: Any, mask: Tensor) -> Iterator[list[bool]]:
    """Append the masked batch to the input of the last stage; the list is filled once that has happened."""
    done: list[bool] = []

    def double(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        done.append(True)
        return (torch.cat([inputs[0], _times(backbone, inputs[0], mask)]), *inputs[1:])

    module = feature_info(backbone)[-1]["module"]
    try:
        last = backbone.get_submodule(module)
    except AttributeError:
        name = type(backbone).__name__
        raise L2R2Error(f'{name} cannot be masked before its last stage: it has no {module}; use late_stage "last".') from None
    handle = last.register_forward_pre_hook(double)
    try:
        yield done
    finally:
        handle.remove()


def _times(backbone: Any, features: Tensor, mask: Tensor) -> Tensor:
    """Multiply features by the resized mask, except for prefix tokens."""
    if features.ndim == 3:  # [B, P + N, C]
        if not all(hasattr(backbone, name) for name in ("num_prefix_tokens", "fc_norm", "head_drop")):
            raise L2R2Error(f"{type(backbone).__name__} cannot be masked late: it does not pool tokens like timm's ViTs.")
        prefixes = backbone.num_prefix_tokens
        weights = coverage(mask, _grid_of(features.shape[1] - prefixes, mask, backbone)).flatten(1)
        weights = torch.cat([weights.new_ones(weights.shape[0], prefixes), weights], 1)
        return features * weights[..., None].to(features.dtype)
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features * coverage(mask, (features.shape[1], features.shape[2]))[..., None].to(features.dtype)
    return features * coverage(mask, (features.shape[2], features.shape[3]))[:, None].to(features.dtype)


def _pool_masked(backbone: Any, features: Tensor, mask: Tensor, pool: str) -> Tensor:
    """Pool features that are 0 outside the mask, over all positions, or over the area that the mask covers."""
    if features.ndim == 3:
        patches = features[:, backbone.num_prefix_tokens :]
        covered = coverage(mask, _grid_of(patches.shape[1], mask, backbone)).flatten(1).sum(1, keepdim=True)
        count = covered.clamp_min(1e-6) if pool == "mask" else patches.shape[1]
        pooled: Tensor = backbone.head_drop(backbone.fc_norm(patches.sum(1) / count))
        return pooled
    if pool == "mask":
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        grid = features.shape[1:3] if channels_last else features.shape[2:]
        mean = coverage(mask, (grid[0], grid[1])).mean((1, 2)).clamp_min(1e-6)
        features = features / mean[:, None, None, None].to(features.dtype)  # turns the head's mean into the masked mean
    pooled = backbone.forward_head(features, pre_logits=True)
    return pooled


def _grid_of(patches: int, mask: Tensor, backbone: Any) -> tuple[int, int]:
    """The grid `(rows, columns)` of a number of patches, for an image with the mask's aspect ratio."""
    rows = round(math.sqrt(patches * mask.shape[1] / mask.shape[2]))
    if rows < 1 or patches % rows:
        name, sides = type(backbone).__name__, f"{mask.shape[1]} x {mask.shape[2]}"
        raise L2R2Error(f"{name} cannot be masked late: its {patches} tokens do not form a grid over an image of {sides}.")
    return rows, patches // rows

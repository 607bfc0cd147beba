"""timm's ViT and Eva blocks on kept tokens only, and the masked form that keeps every token.

Both run the layers of the blocks and replace only the attention core, so weights, norms, LayerScale, dropout and drop path
are those of the model. With the same mask in all blocks, the two agree on the kept tokens: a dropped token is never a key, so
it affects no other token.
"""

from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from .attention import masked_attention, varlen_attention
from .key_gradient import with_key_gradient
from .op import key_index, runs_triton
from .packing import Packed, check_tokens, pack, unpack
from .rope import Rotary, rotaries

# Members of timm's vision_transformer.Block and layers.Attention, and of eva.EvaBlock with its attentions. Any other member would
# be ignored here, so such blocks are refused.
_BLOCK_CHILDREN = {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}
_BLOCK_NAMES = {"Block": _BLOCK_CHILDREN | {"ls1", "ls2"}, "EvaBlock": _BLOCK_CHILDREN | {"gamma_1", "gamma_2", "init_values"}}
_ATTENTION_NAMES = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_ATTENTION_NAMES |= {"num_heads", "head_dim", "attn_dim", "scale", "fused_attn"}
_EVA_NAMES = {"q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "num_prefix_tokens", "rotate_half"}
_EVA_NAMES |= {"num_kv_heads", "num_kv_groups", "kv_dim"}
_ATTENTIONS = {"Block": ("Attention",), "EvaBlock": ("EvaAttention", "AttentionRope")}
_MLPS = {"Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked"}  # one token at a time

Core = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def run_packed(
    blocks: Iterable[nn.Module], x: Tensor, mask: Tensor, *, num_prefix: int = 0, capacity: int | str | None = None,
    unpacked: bool = False, fill: float = 0.0, backend: str = "auto", checkpoint: bool = False, rope: Tensor | None = None,
) -> tuple[Packed, Tensor | None]:  # fmt: skip
    """Run timm ViT blocks on the kept tokens only.

    Args:
        blocks: timm ``Block`` or ``EvaBlock`` modules, e.g. ``model.blocks``. Blocks with other members than timm's, or
            with forward hooks, would not run correctly, so they are refused (not checked while ``torch.compile`` traces).
        x: ``[B, N, C]`` tokens as they enter the first block: prefix tokens first, positions added, ``norm_pre`` done.
        mask: ``[B, N]`` bool, True = kept; the same through all blocks.
        num_prefix: number of first tokens that are always kept.
        capacity: rows of the packed tokens, see ``pack``.
        unpacked: also return the tokens at their original positions, with ``fill`` for dropped ones.
        backend: see ``masked_attention``.
        checkpoint: store only the input of each block, and recompute its activations in the backward pass.
        rope: rotary embeddings of the patches, as Eva models (EVA-02, DINOv3, PE) give them to their blocks: ``[P, 2 D]``,
            ``[H, P, 2 D]`` or ``[depth, H, P, 2 D]``, sines before cosines. The N - P tokens before them are not rotated.

    Returns:
        (packed tokens after the last block, unpacked tokens ``[B, N, C]`` or None). ``packed.prefix()`` has the prefix
        tokens. The model's final norm is not applied.

    Raises:
        TypeError: when a block is not supported; the message names its class and the reason.
        ValueError: when an argument does not match.

    Source: iFAM; equal to keys-only masking (``run_masked``) for kept tokens. Drop path is drawn once per image, as in timm.
    """
    blocks = _checked(blocks, rope)
    packed = pack(x, mask, num_prefix=num_prefix, capacity=capacity)

    def core(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return varlen_attention(q, k, v, packed.cu_seqlens, packed.max_len, scale=scale, backend=backend)

    image = packed.image_of_token() if any(_drops_paths(block) for block in blocks) else None

    def drop_path(layer: nn.Module, branch: Tensor) -> Tensor:
        if image is None:
            return branch
        factor: Tensor = layer(branch.new_ones(packed.batch, 1))  # [B, 1]: one draw per image
        return branch * factor[image]

    tokens = packed.tokens
    for block, rotary in zip(blocks, _rotaries(rope, x.shape[1], len(blocks), packed.source.clamp_min(0) % max(x.shape[1], 1))):
        tokens = _run(checkpoint, block, tokens, core, drop_path, rotary)
    packed = Packed(tokens, *packed[1:])  # torch 2.11 cannot compile _replace
    return packed, unpack(packed, fill) if unpacked else None


def run_masked(
    blocks: Iterable[nn.Module], x: Tensor, mask: Tensor, *, num_prefix: int = 0, backend: str = "auto",
    key_weight: Tensor | None = None, checkpoint: bool = False, rope: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run timm ViT blocks on all tokens, with masked tokens excluded as keys.

    Arguments and errors as in ``run_packed``, and ``key_weight``, ``[B, N]``: 1 where ``mask`` is True and 0 elsewhere, a
    straight-through mask. It does not change the result; its gradient is how the result would change if a token counted more or
    less as a key, in every block and head, masked tokens included (see ``with_key_gradient``; its memory does not grow with the
    number of blocks).

    Returns ``[B, N, C]``; masked tokens are computed too (they see the kept ones), for models whose later layers need every
    token. The attention output of an image without a kept token or prefix is zero.
    """
    blocks = _checked(blocks, rope)
    mask, index, count = _keys(x, mask, key_weight, num_prefix, backend)

    def core(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:  # [B, N, H, D]
        out: Tensor = _core(q, k, v, mask, index, count, key_weight, scale, backend)
        return out

    tokens = x.shape[1]
    if rope is not None and isinstance(x, torch.fx.Proxy):  # an FX graph does not know its shapes
        tokens = rope.shape[-2] + num_prefix
    for block, rotary in zip(blocks, _rotaries(rope, tokens, len(blocks), None)):
        x = _run(checkpoint, block, x, core, lambda layer, branch: layer(branch), rotary)
    return x


def _rotaries(rope: Tensor | None, tokens: int, blocks: int, rows: Tensor | None) -> list[Rotary | None]:
    """Return the rotary embeddings of each block, at the tokens ``rows`` if given; one gather if the blocks share them."""
    if rope is None:
        return [None] * blocks
    all_rotaries = rotaries(rope, tokens, blocks)
    if rows is None:
        return [*all_rotaries]
    if rope.dim() < 4:
        return [all_rotaries[0].at(rows)] * blocks if blocks else []
    return [rotary.at(rows) for rotary in all_rotaries]


# Code that depends on values or shapes is one node of an FX graph (and stays Python if such a graph is scripted).


@torch.fx.wrap
@torch.jit.ignore
def _keys(
    x: Tensor,
    mask: Tensor,
    key_weight: Tensor | None,
    num_prefix: int,
    backend: str,
) -> tuple[Tensor, Optional[Tensor], Optional[Tensor]]:  # noqa: UP045
    """Return the checked mask with the prefix kept, and its ``key_index`` if the Triton kernels run."""
    check_tokens(x, mask, num_prefix)
    if key_weight is not None:
        _check_weight(key_weight, x)
    mask = mask.to(x.device, non_blocking=True)
    if num_prefix:
        mask = mask | (torch.arange(x.shape[1], device=x.device) < num_prefix)
    return (mask, *key_index(mask, backend)) if runs_triton(x, 0, backend) else (mask, None, None)


@torch.fx.wrap
@torch.jit.ignore
def _core(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, index: Optional[Tensor], count: Optional[Tensor],  # noqa: UP045
    key_weight: Optional[Tensor], scale: float, backend: str,  # noqa: UP045
) -> Tensor:  # fmt: skip
    """Masked attention of q, k, v ``[B, N, H, D]``, with the gradient of the key weights if they are given."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    keys = None if index is None or count is None else (index, count)
    out = masked_attention(q, k, v, mask, scale=scale, keys=keys, backend=backend)
    if key_weight is not None:
        out = with_key_gradient(out, q, k, v, key_weight, mask, scale)
    return out.transpose(1, 2)


def _check_weight(weight: Tensor, x: Tensor) -> None:
    if weight.shape != x.shape[:2] or not weight.is_floating_point() or weight.device != x.device:
        raise ValueError(
            f"key_weight must be a floating tensor [B, N] = {list(x.shape[:2])} on {x.device}; "
            f"got {weight.dtype} {list(weight.shape)} on {weight.device}."
        )


def _run(checkpoint: bool, *block_and_inputs: Any) -> Tensor:
    return recompute(_block, *block_and_inputs, use_reentrant=False) if checkpoint else _block(*block_and_inputs)


def _block(
    block: Any,
    x: Tensor,
    core: Core,
    drop_path: Callable[[nn.Module, Tensor], Tensor],
    rotary: Optional[Rotary],  # noqa: UP045
) -> Tensor:
    """The forward of timm's ``Block`` and ``EvaBlock``, for x ``[..., C]``."""
    x = x + drop_path(block.drop_path1, _scaled(block, "1", _attention(block.attn, block.norm1(x), core, rotary)))
    return x + drop_path(block.drop_path2, _scaled(block, "2", block.mlp(block.norm2(x))))


def _scaled(block: Any, which: str, branch: Tensor) -> Tensor:
    """A branch times the block's layer scale: the layer ``ls`` of a Block, the parameter ``gamma_`` of an EvaBlock."""
    if hasattr(block, f"ls{which}"):
        scaled: Tensor = getattr(block, f"ls{which}")(branch)
        return scaled
    gamma: Tensor | None = getattr(block, f"gamma_{which}")
    return branch if gamma is None else gamma * branch


def _attention(attn: Any, x: Tensor, core: Core, rotary: Rotary | None) -> Tensor:
    """The forward of timm's attentions, for x ``[..., C]``."""
    q, k, v = _qkv(attn, x)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rotary is not None:
        half = getattr(attn, "rotate_half", False)
        q, k = (rotary.rotate(y, half).to(v.dtype) for y in (q, k))
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, -2), v.repeat_interleave(groups, -2)
    out = core(q, k, v, attn.scale).flatten(-2)
    out = attn.norm(out) if hasattr(attn, "norm") else out
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    projected: Tensor = attn.proj_drop(attn.proj(out))
    return projected


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v ``[..., H, D]``."""
    if attn.qkv is None:
        heads = (attn.num_heads, *[getattr(attn, "num_kv_heads", attn.num_heads)] * 2)
        return tuple(layer(x).unflatten(-1, (h, -1)) for layer, h in zip((attn.q_proj, attn.k_proj, attn.v_proj), heads))
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    by_head: Tensor = qkv.unflatten(-1, (3, attn.num_heads, -1))
    return by_head.unbind(-3)


def _drops_paths(block: Any) -> bool:
    return block.training and not (isinstance(block.drop_path1, nn.Identity) and isinstance(block.drop_path2, nn.Identity))


def _checked(blocks: Iterable[nn.Module], rope: Tensor | None) -> list[nn.Module]:
    blocks = list(blocks)
    for number, block in enumerate(blocks):
        reason = _refusal(block)
        if not reason and rope is not None and type(block).__name__ == "Block":
            reason = "it takes no rotary embeddings; do not pass rope"
        if reason:
            raise TypeError(
                f"Block {number} is a {type(block).__name__} that cannot run on masked tokens: {reason}. "
                "timm's plain ViT blocks can (vision_transformer.Block with layers.Attention), and Eva's (eva.EvaBlock)."
            )
    return blocks


def _refusal(block: Any) -> str | None:
    """Return the reason why this block would behave differently here than in its own forward, or None."""
    kind = type(block).__name__
    if kind not in _BLOCK_NAMES or not hasattr(block, "attn"):
        return "its forward is not that of timm's Block"
    attn = block.attn
    if type(attn).__name__ not in _ATTENTIONS[kind]:
        return f"its attention is a {type(attn).__name__}"
    missing = [name for name in _BLOCK_NAMES[kind] if not hasattr(block, name)]
    missing += [name for name in ("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop") if not hasattr(attn, name)]
    if missing:
        return f"it has no {', '.join(sorted(missing))}"
    if type(block.mlp).__name__ not in _MLPS:
        return f"its MLP is a {type(block.mlp).__name__}, which may mix tokens"
    if any(isinstance(norm, _BatchNorm) for norm in (block.norm1, block.norm2, attn.q_norm, attn.k_norm)):
        return "its BatchNorm mixes tokens"
    if attn.training and attn.attn_drop.p > 0:
        return "attention dropout is not supported in training; set attn_drop to 0"
    # Older compilers cannot trace the inspection of a module's names; a compiled model is checked when it runs eagerly.
    return None if torch.compiler.is_compiling() else _ignored(block)


def _ignored(block: Any) -> str | None:
    """Return the members of the block or its attention that would not run here, or None."""
    eva = type(block).__name__ == "EvaBlock"
    known_of_attention = _ATTENTION_NAMES | (_EVA_NAMES if eva else set())
    for module, name, known in (
        (block, "it", _BLOCK_NAMES[type(block).__name__]), (block.attn, "its attention", known_of_attention)
    ):  # fmt: skip
        extra = _own_names(module) - known
        if extra:
            return f"{name} has {', '.join(sorted(extra))}, which would be ignored"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has forward hooks, which would not run"
    return None


def _own_names(module: nn.Module) -> set[str]:
    """Return the names of children, parameters, buffers and plain attributes, without those of nn.Module itself."""
    plain = {name for name in vars(module) if not name.startswith("_") and name != "training"}
    return plain | set(module._modules) | set(module._parameters) | set(module._buffers)

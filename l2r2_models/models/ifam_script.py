"""The TorchScript form of an iFAM model."""

# no `from __future__ import annotations`: jit needs annotations as types, not as strings

from typing import Any, Final, Optional

import torch
from timm.models import Eva
from torch import Tensor, nn

from ..fusion import fall_back


class _Blocks(nn.Module):
    """The tokens of a ViT, and its blocks on them; see `masking.embed_tokens` and `masking.run_all`."""

    rotary: Final[bool]
    mixed: Final[bool]

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.rotary, self.mixed = isinstance(vit, Eva), bool(getattr(vit, "rope_mixed", False))

    def embed(self, x: Tensor) -> tuple[Tensor, Optional[Tensor]]:  # noqa: UP045  (jit)
        """Tokens `[B, P + N, C]` of images, and the rotary embeddings."""
        rope: Optional[Tensor] = None  # noqa: UP045
        patches = self.vit.patch_embed(x)
        if self.rotary:
            tokens, rope = self.vit._pos_embed(patches)
        else:
            tokens = self.vit._pos_embed(patches)
        return self.vit.norm_pre(tokens), rope

    def run(self, tokens: Tensor, rope: Optional[Tensor], keys: Optional[Tensor]) -> Tensor:  # noqa: UP045
        """Tokens after the last norm; only `keys` `[B, 1, 1, P + N]` bool are seen, if given."""
        for i, block in enumerate(self.vit.blocks):
            if self.rotary:
                of_block = rope
                if self.mixed and rope is not None:
                    of_block = rope[i]
                tokens = block(tokens, of_block, keys)
            else:
                tokens = block(tokens, keys)
        normed: Tensor = self.vit.norm(tokens)
        return normed


class ScriptedIFAM(nn.Module):
    """The evaluation pass of an `IFAM` without boxes, in TorchScript: stage 2 runs on all tokens with masked keys.

    Args:
        first: the ViT of stage 1.
        second: the ViT of stage 2; it may be the same.
        parts: the `PartDiscovery` of stage 1.
        full: the head of stage 1.
        fg: the head of stage 2.
        fusion: the fusion of both.
    """

    def __init__(self, first: Any, second: Any, parts: Any, full: nn.Module, fg: nn.Module, fusion: nn.Module) -> None:
        super().__init__()
        self.shared = first is second
        self.first = _Blocks(first)
        self.second = self.first if self.shared else _Blocks(second)
        self.head_drop, self.fc_norm = second.head_drop, second.fc_norm
        self.full, self.fg, self.fusion = full, fg, fusion
        self.prototypes, self.norm, self.num_parts = parts.prototypes, parts.norm, parts.num_parts
        self.prefix = int(first.num_prefix_tokens)
        self.by_token, self.with_prefix = second.global_pool == "token", bool(getattr(second, "pool_include_prefix", False))
        self.train(first.training)

    def forward(self, x: Tensor) -> Tensor:
        """Fused logits `[B, classes]` of normalized images `[B, C, S, S]`.

        Raises:
            RuntimeError: when the model is in training mode.
        """
        if self.training:
            raise RuntimeError("a scripted iFAM model cannot be trained; call eval() on it")
        tokens, rope = self.first.embed(x)
        patches = self.first.run(tokens, rope, None)[:, self.prefix :].float()
        prototypes = self.prototypes.float()
        distances = patches.square().sum(2, keepdim=True) - 2 * patches @ prototypes.t() + prototypes.square().sum(1)
        maps = (-distances).softmax(2)[:, :, : self.num_parts].transpose(1, 2)  # [B, K, N]
        vectors = (maps / maps.sum(2, keepdim=True).clamp_min(1e-6)) @ patches
        full = self.full(self.norm(vectors.to(x.dtype))).mean(1)

        keep = (-distances).argmax(2) < self.num_parts  # [B, N]
        seen = keep.any(1)
        if not self.shared:
            tokens, rope = self.second.embed(x)
        keys = torch.nn.functional.pad(keep | ~seen[:, None], (self.prefix, 0), value=True)[:, None, None]
        tokens = self.second.run(tokens, rope, keys)
        fg = self.fg(self.head_drop(self.fc_norm(self._pool(tokens, keep))))
        return fall_back(self.fusion(fg, full[None]), full, seen)

    def _pool(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """The class token or the mean of kept patches, depending on the ViT's pooling."""
        if self.by_token:
            return tokens[:, 0]
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        pooled, count = (patches * keep[:, :, None]).sum(1), keep.sum(1, keepdim=True)
        if self.with_prefix:
            pooled, count = pooled + prefix.sum(1), count + self.prefix
        return pooled / count.clamp_min(1)

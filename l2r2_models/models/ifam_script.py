"""The TorchScript form of an iFAM model."""

# no `from __future__ import annotations`: jit needs annotations as types, not as strings

from typing import Any

import torch
from torch import Tensor, nn

from ..fusion import fall_back


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
        self.first, self.second, self.full, self.fg, self.fusion = first, second, full, fg, fusion
        self.shared = first is second
        self.prototypes, self.norm, self.num_parts = parts.prototypes, parts.norm, parts.num_parts
        self.prefix = int(first.num_prefix_tokens)
        self.by_token, self.with_prefix = second.global_pool == "token", bool(second.pool_include_prefix)
        self.train(first.training)

    def forward(self, x: Tensor) -> Tensor:
        """Fused logits `[B, classes]` of normalized images `[B, C, S, S]`.

        Raises:
            RuntimeError: when the model is in training mode.
        """
        if self.training:
            raise RuntimeError("a scripted iFAM model cannot be trained; call eval() on it")
        tokens = self.first.norm_pre(self.first._pos_embed(self.first.patch_embed(x)))
        patches = self.first.norm(self.first.blocks(tokens))[:, self.prefix :].float()
        prototypes = self.prototypes.float()
        distances = patches.square().sum(2, keepdim=True) - 2 * patches @ prototypes.t() + prototypes.square().sum(1)
        maps = (-distances).softmax(2)[:, :, : self.num_parts].transpose(1, 2)  # [B, K, N]
        vectors = (maps / maps.sum(2, keepdim=True).clamp_min(1e-6)) @ patches
        full = self.full(self.norm(vectors.to(x.dtype))).mean(1)

        keep = (-distances).argmax(2) < self.num_parts  # [B, N]
        seen = keep.any(1)
        if not self.shared:
            tokens = self.second.norm_pre(self.second._pos_embed(self.second.patch_embed(x)))
        keys = torch.nn.functional.pad(keep | ~seen[:, None], (self.prefix, 0), value=True)[:, None, None]
        for block in self.second.blocks:
            tokens = block(tokens, keys)
        fg = self.fg(self.second.head_drop(self.second.fc_norm(self._pool(self.second.norm(tokens), keep))))
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

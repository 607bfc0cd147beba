"""CUDA graphs of a ViT's blocks on kept tokens, for prediction in batches of one size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from l2r2_kernels import PackedRunner
from torch import Tensor, nn

CAPACITIES = 16  # maximum number of graphs; each has room for another number of kept tokens


class PackedGraphs:
    """Replay the blocks of one ViT as CUDA graphs inside `with graphs.replayed():`, in inference mode.

    Packed blocks are many short kernels, so for small batches the host limits the speed; a graph launches them all at once. It
    has a fixed number of rows: the kept tokens of a batch are rounded up to the next sixteenth of all its tokens, and each
    number that occurs gets a graph of its own. Batches of another size, and everything on a CPU, run eagerly.

    Args:
        vit: see `masking.check_tokens_backbone`.
        batch: images per batch.
    """

    def __init__(self, vit: Any, batch: int) -> None:
        self.vit, self.batch = vit, batch
        self._runners: dict[tuple[int, int], PackedRunner] = {}
        self._lock = threading.Lock()  # a replay overwrites the result of the one before

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Let `masking.run_tokens` use these graphs."""
        before = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(before)

    def run(self, tokens: Tensor, mask: Tensor, rope: Tensor | None) -> Tensor:
        """Run the blocks on tokens `[B, N, C]`; see `run_packed`. Dropped tokens are 0 in the result.

        Args:
            tokens: as they enter the first block.
            mask: `[B, N]` bool, prefix tokens included; counting it waits for the GPU once.
            rope: rotary embeddings, or None.
        """
        step = -(-mask.numel() // CAPACITIES)
        shape = (mask.shape[1], -(-int(mask.sum()) // step) * step)
        with self._lock:
            if shape not in self._runners:
                self._runners[shape] = PackedRunner(self.vit.blocks, self.batch, *shape, unpacked=True)
            out = self._runners[shape](tokens, mask, rope)[1]
            assert out is not None
            return out.clone()


def graphs_of(vit: nn.Module, tokens: Tensor) -> PackedGraphs | None:
    """Return the graphs in use, if they are for this ViT and batch size and no gradients are needed."""
    graphs = _CURRENT.get()
    usable = graphs is not None and graphs.vit is vit and len(tokens) == graphs.batch and torch.is_inference_mode_enabled()
    return graphs if usable else None


_CURRENT: ContextVar[PackedGraphs | None] = ContextVar("packed_graphs", default=None)

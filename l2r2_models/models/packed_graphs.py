"""CUDA graphs of the blocks of a ViT that drops tokens, for batches of one size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from l2r2_kernels import GraphMemory, MaskedRunner, PackedRunner
from torch import Tensor, nn

CAPACITIES = 16  # sizes of graphs for prediction
TRAINED = 4  # the same for training, where each graph also has buffers for all gradients of the blocks


class PackedGraphs:
    """Replay the blocks of one ViT as CUDA graphs inside `with graphs.replayed():`.

    Packed blocks are many short kernels, so for small batches the host limits the speed; a graph launches them all at once. It
    has a fixed number of rows, its capacity: the kept tokens of a batch are rounded up to the next sixteenth of all its tokens
    (in training, the next quarter), and each capacity that occurs gets a graph. It depends on the batch alone, not on those
    before it, so that dropout draws as many random numbers after a resume. Batches of another size, and everything on a CPU,
    run eagerly.

    For prediction, graphs are used in inference mode; with `training`, where gradients are enabled, and have a backward pass.
    A second pass of a training step runs eagerly, because a replay would overwrite the activations of the first. With weights
    of the keys (the second stage of an iFAM model in training) all tokens are computed, by one graph.

    Args:
        vit: see `masking.check_tokens_backbone`.
        batch: images per batch.
        training: record the backward pass too.
        memory: memory of the graphs; they share it, because one of them is used at a time.
    """

    def __init__(self, vit: Any, batch: int, *, training: bool = False, memory: GraphMemory | None = None) -> None:
        self.vit, self.batch, self.training = vit, batch, training
        self.memory = memory or GraphMemory()
        self._runners: dict[tuple[int, int], PackedRunner] = {}
        self._masked: dict[int, MaskedRunner] = {}
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

        Returns:
            `[B, N, C]`. In training, the next replay overwrites it.
        """
        with self._lock:
            out = self._runner(mask)(tokens, mask, rope)[1]
            assert out is not None
            return out if self.training else out.clone()

    def run_masked(self, tokens: Tensor, mask: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
        """Run the blocks on all tokens with masked keys in training; see `run_masked`. The next replay overwrites the result."""
        number = mask.shape[1]
        if number not in self._masked:
            self._masked[number] = MaskedRunner(
                self.vit.blocks, self.batch, number, num_prefix=self.vit.num_prefix_tokens, training=True, memory=self.memory
            )
        return self._masked[number](tokens, mask, weight, rope)

    def _runner(self, mask: Tensor) -> PackedRunner:
        """The graph with the fewest rows that the kept tokens of a batch fit into."""
        number, step = mask.shape[1], -(-mask.numel() // (TRAINED if self.training else CAPACITIES))
        capacity = -(-int(mask.sum()) // step) * step
        if (number, capacity) not in self._runners:
            self._runners[number, capacity] = PackedRunner(
                self.vit.blocks, self.batch, number, capacity, unpacked=True, training=self.training, memory=self.memory
            )
        return self._runners[number, capacity]


def graphs_of(vit: nn.Module, tokens: Tensor) -> PackedGraphs | None:
    """Return the graphs in use, if they are for this ViT and batch size, and for training or prediction as this pass is."""
    graphs = _CURRENT.get()
    if graphs is None or graphs.vit is not vit or len(tokens) != graphs.batch:
        return None
    right = torch.is_grad_enabled() if graphs.training else torch.is_inference_mode_enabled()
    return graphs if right else None


_CURRENT: ContextVar[PackedGraphs | None] = ContextVar("packed_graphs", default=None)

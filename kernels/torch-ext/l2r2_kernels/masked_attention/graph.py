"""`run_packed` as one CUDA graph: about 180 launches of a ViT-B become one, which removes the host-side bottleneck."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .blocks import run_packed
from .packing import Packed

Replay = Callable[..., tuple[Tensor, ...]]  # inputs and outputs of `_Blocks`


class _Blocks(nn.Module):
    """The blocks on packed tokens as a module with tensors as inputs and outputs, so that it can be captured."""

    def __init__(self, blocks: Iterable[nn.Module], capacity: int, num_prefix: int, unpacked: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.capacity, self.num_prefix, self.unpacked = capacity, num_prefix, unpacked

    def forward(self, x: Tensor, mask: Tensor, rope: Tensor | None = None) -> tuple[Tensor, ...]:
        packed, unpacked = run_packed(
            self.blocks, x, mask, num_prefix=self.num_prefix, capacity=self.capacity, unpacked=self.unpacked, rope=rope
        )
        outputs = (packed.tokens, packed.cu_seqlens, packed.source, packed.inverse, packed.overflow)
        return outputs if unpacked is None else (*outputs, unpacked)


class PackedRunner:
    """Run timm ViT blocks on the kept tokens of batches of a fixed shape by replaying a CUDA graph.

    The graph is captured at the first call, and again if the dtype, autocast or the address of a parameter changes. Calls that
    cannot be replayed (on a CPU, with another shape, under `torch.compile`, with gradients unless `training`) run eagerly.

    Args:
        blocks: see `run_packed`.
        batch, tokens: the shape ``[B, N]`` of the masks.
        capacity: rows of the packed tokens. With more kept tokens than that, every token is NaN and `packed.overflow` is True.
        num_prefix, unpacked: see `run_packed`.
        training: capture the backward pass too; then calls with gradients are replayed, and those without run eagerly. Dropout
            and drop path draw new random numbers in every replay.

    >>> import timm
    >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> run = PackedRunner(vit.blocks, batch=2, tokens=197, capacity=128, num_prefix=1)
    >>> kept = torch.zeros(2, 197, dtype=torch.bool).index_fill(1, torch.arange(50), True)
    >>> run(torch.randn(2, 197, 192), kept)[0].tokens.shape
    torch.Size([128, 192])
    """

    def __init__(
        self, blocks: Iterable[nn.Module], batch: int, tokens: int, capacity: int, *, num_prefix: int = 0,
        unpacked: bool = False, training: bool = False,
    ) -> None:  # fmt: skip
        self.module = _Blocks(blocks, capacity, num_prefix, unpacked)
        self.shape, self.training = (batch, tokens), training
        self._graph: tuple[Any, Replay] | None = None

    def __call__(self, x: Tensor, mask: Tensor, rope: Tensor | None = None) -> tuple[Packed, Tensor | None]:
        """Run the blocks on tokens ``[B, N, C]`` with a bool mask ``[B, N]``, and the rotary embeddings of `run_packed`.

        Returns:
            As `run_packed`. The tensors of a replay are overwritten by the next one.
        """
        if not self._replays(x, mask):
            return self._eager(x, mask, rope)
        key, inputs = self.key(x, rope), (x, mask) if rope is None else (x, mask, rope)
        if self._graph is None or self._graph[0] != key:
            self._graph = None  # free the memory of the old graph before the new one is captured
            self._graph = (key, self._capture_training(*inputs) if self.training else self._capture(*inputs))
        tokens, cu_seqlens, source, inverse, overflow, *rest = self._graph[1](*inputs)
        packed = Packed(tokens, cu_seqlens, self.shape[1], source, inverse, overflow, self.module.num_prefix)
        return packed, rest[0] if rest else None

    def key(self, x: Tensor, rope: Tensor | None = None) -> tuple[Any, ...]:
        """Return everything a captured graph depends on: its inputs, autocast, modes of the blocks, parameter addresses."""
        inputs = [(y.shape, y.dtype, y.device, y.requires_grad) for y in (x, rope) if y is not None]
        # tensors made in inference mode cannot be written outside of it
        inference = torch.is_inference_mode_enabled()
        autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        modes = tuple(block.training for block in self.module.blocks)
        places = tuple(parameter.data_ptr() for parameter in self.module.parameters())
        return *inputs, inference, autocast, modes, places

    def _replays(self, x: Tensor, mask: Tensor) -> bool:
        return (
            x.is_cuda
            and tuple(x.shape[:2]) == self.shape == tuple(mask.shape)
            and torch.is_grad_enabled() == self.training
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
        )

    def _eager(self, x: Tensor, mask: Tensor, rope: Tensor | None) -> tuple[Packed, Tensor | None]:
        module = self.module
        fits = tuple(x.shape[1:2]) == self.shape[1:] and x.shape[0] <= self.shape[0]
        capacity = module.capacity if fits else "sync"
        return run_packed(
            module.blocks, x, mask, num_prefix=module.num_prefix, capacity=capacity, unpacked=module.unpacked, rope=rope
        )

    def _autocast(self, x: Tensor) -> torch.autocast:
        """Return the current autocast without its cache, so that casts of weights are captured in the graph."""
        device = x.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)

    def _capture(self, x: Tensor, *others: Tensor) -> Replay:
        places = [y.to(x.device, copy=True) for y in (x, *others)]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
        with torch.cuda.device(x.device), self._autocast(x):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compile the kernels and initialize the libraries, which cannot be captured
                    self.module(*places)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                outputs: tuple[Tensor, ...] = self.module(*places)

        def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
            for place, given in zip(places, inputs):
                place.copy_(given, non_blocking=True)
            graph.replay()
            return outputs

        return replay

    def _capture_training(self, x: Tensor, *others: Tensor) -> Replay:
        module = _Blocks(self.module.blocks, self.module.capacity, self.module.num_prefix, self.module.unpacked)
        samples = tuple(y.detach().to(x.device, copy=True).requires_grad_(y.requires_grad) for y in (x, *others))
        with torch.cuda.device(x.device), self._autocast(x):
            # only some outputs and parameters require gradients
            graphed = torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)
        return cast(Replay, graphed)

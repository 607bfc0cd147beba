"""`run_packed` and `run_masked` as CUDA graphs: one launch instead of about 180 for a ViT-B, which are limited by the host."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import run_masked, run_packed
from .packing import Packed
from .recording import GraphMemory, RecordedForward, RecordedStep


class _Blocks(nn.Module):
    """The blocks on packed tokens as a module with tensors as inputs and outputs, so that it can be recorded."""

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


class _MaskedBlocks(nn.Module):
    """The blocks on all tokens with masked keys."""

    def __init__(self, blocks: Iterable[nn.Module], num_prefix: int) -> None:
        super().__init__()
        self.blocks, self.num_prefix = nn.ModuleList(blocks), num_prefix

    def forward(
        self, x: Tensor, mask: Tensor, key_weight: Tensor | None = None, rope: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (run_masked(self.blocks, x, mask, num_prefix=self.num_prefix, key_weight=key_weight, rope=rope),)


class _Runner:
    """Replay a module of blocks for inputs of a fixed shape."""

    module: Any

    def __init__(self, batch: int, tokens: int, training: bool, memory: GraphMemory | None) -> None:
        self.shape, self.training = (batch, tokens), training
        self.memory = memory or GraphMemory()
        self._graph: tuple[Any, RecordedForward | RecordedStep] | None = None

    def key(self, x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        """Return everything a recorded graph depends on: inputs, autocast, modes of the blocks, addresses of the parameters."""
        inputs = [None if y is None else (y.shape, y.dtype, y.device, y.requires_grad) for y in (x, *others)]
        # tensors made in inference mode cannot be written outside of it
        inference = torch.is_inference_mode_enabled()
        autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        modes = tuple(block.training for block in self.module.blocks)
        places = tuple((parameter.data_ptr(), parameter.requires_grad) for parameter in self.module.parameters())
        return *inputs, inference, autocast, modes, places

    def _replays(self, x: Tensor, mask: Tensor) -> bool:
        return (
            tuple(x.shape[:2]) == self.shape == tuple(mask.shape)
            and torch.is_grad_enabled() == self.training
            and not torch.compiler.is_compiling()
            and self.memory.holds(x)
            and not self.memory.busy
        )

    def _replay(self, x: Tensor, mask: Tensor, **others: Tensor | None) -> Sequence[Any]:
        """The outputs of the module, from its graph for such inputs, which is recorded if there is none."""
        key = self.key(x, *others.values())
        given = {"x": x, "mask": mask.to(x.device, non_blocking=True), **{k: y for k, y in others.items() if y is not None}}
        if self._graph is None or self._graph[0] != key:
            self._graph = None  # free the memory of the old graph before the new one is recorded
            with self.memory.recording(x.device), _without_cache(x.device.type):
                self._graph = (key, self._record(given))
        return self._graph[1](*given.values())

    def _record(self, given: dict[str, Tensor]) -> RecordedForward | RecordedStep:
        inputs = list(given.values())
        if not self.training:
            return RecordedForward(lambda *values: self.module(**dict(zip(given, values))), inputs, self.memory)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}

        def call(parameters: Sequence[Tensor], *values: Tensor) -> Any:
            return torch.func.functional_call(self.module, dict(zip(trained, parameters)), (), dict(zip(given, values)))

        return RecordedStep(call, list(trained.values()), inputs, self.memory)


class PackedRunner(_Runner):
    """Run timm ViT blocks on the kept tokens of batches of a fixed shape by replaying a CUDA graph.

    The graph is recorded at the first call, and again if the dtype, autocast or the address of a parameter changes. Calls that
    cannot be replayed run eagerly: on a CPU, with another shape, under `torch.compile`, with gradients unless `training`, and
    while an earlier call with gradients waits for its backward pass.

    Args:
        blocks: see `run_packed`.
        batch, tokens: the shape ``[B, N]`` of the masks.
        capacity: rows of the packed tokens. With more kept tokens than that, every token is NaN and `packed.overflow` is True.
        num_prefix, unpacked: see `run_packed`.
        training: record the backward pass too; then calls with gradients are replayed, and those without run eagerly. Dropout
            and drop path draw new random numbers in every replay.
        memory: memory to share with other runners, of which one is used at a time; each has its own by default.

    >>> import timm
    >>> vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> run = PackedRunner(vit.blocks, batch=2, tokens=197, capacity=128, num_prefix=1)
    >>> kept = torch.zeros(2, 197, dtype=torch.bool).index_fill(1, torch.arange(50), True)
    >>> run(torch.randn(2, 197, 192), kept)[0].tokens.shape
    torch.Size([128, 192])
    """

    def __init__(
        self, blocks: Iterable[nn.Module], batch: int, tokens: int, capacity: int, *, num_prefix: int = 0,
        unpacked: bool = False, training: bool = False, memory: GraphMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(batch, tokens, training, memory)
        self.module = _Blocks(blocks, capacity, num_prefix, unpacked)

    def __call__(self, x: Tensor, mask: Tensor, rope: Tensor | None = None) -> tuple[Packed, Tensor | None]:
        """Run the blocks on tokens ``[B, N, C]`` with a bool mask ``[B, N]``, and the rotary embeddings of `run_packed`.

        Returns:
            As `run_packed`. The tensors of a replay are overwritten by the next one.
        """
        if not self._replays(x, mask):
            return self._eager(x, mask, rope)
        tokens, cu_seqlens, source, inverse, overflow, *rest = self._replay(x, mask, rope=rope)
        packed = Packed(tokens, cu_seqlens, self.shape[1], source, inverse, overflow, self.module.num_prefix)
        return packed, rest[0] if rest else None

    def _eager(self, x: Tensor, mask: Tensor, rope: Tensor | None) -> tuple[Packed, Tensor | None]:
        module = self.module
        fits = tuple(x.shape[1:2]) == self.shape[1:] and x.shape[0] <= self.shape[0]
        capacity = module.capacity if fits else "sync"
        return run_packed(
            module.blocks, x, mask, num_prefix=module.num_prefix, capacity=capacity, unpacked=module.unpacked, rope=rope
        )


class MaskedRunner(_Runner):
    """Run timm ViT blocks on all tokens with masked keys, for batches of a fixed shape, by replaying a CUDA graph.

    Args:
        blocks, num_prefix: see `run_masked`.
        batch, tokens, training, memory: see `PackedRunner`, as for the calls that are not replayed.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], batch: int, tokens: int, *, num_prefix: int = 0, training: bool = False,
        memory: GraphMemory | None = None,
    ) -> None:  # fmt: skip
        super().__init__(batch, tokens, training, memory)
        self.module = _MaskedBlocks(blocks, num_prefix)

    def __call__(self, x: Tensor, mask: Tensor, key_weight: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
        """Run the blocks; arguments and result as in `run_masked`. The next replay overwrites the result of this one."""
        if not self._replays(x, mask):
            out: Tensor = self.module(x, mask, key_weight, rope)[0]
            return out
        out = self._replay(x, mask, key_weight=key_weight, rope=rope)[0]
        return out


def _without_cache(device: str) -> torch.autocast:
    """Return the current autocast without its cache, so that casts of weights are recorded in the graph."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)

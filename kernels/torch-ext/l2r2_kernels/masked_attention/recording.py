"""CUDA graphs of a function of tensors, with its backward pass, in memory that several graphs share."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import on_device

Tensors = Sequence[Tensor]


class GraphMemory:
    """Memory of the CUDA graphs that are recorded in it, which are replayed one at a time.

    Graphs of several sizes need no more memory for activations than the largest. Therefore a graph with a backward pass
    must not be replayed before the backward pass of the last one is done, see `busy`.
    """

    def __init__(self) -> None:
        self._use: weakref.ref[_Use] | None = None
        self._pool: Any = None
        self._stream: Any = None

    @property
    def busy(self) -> bool:
        """Whether a replayed forward pass still waits for its backward pass, whose activations another replay would overwrite."""
        use = None if self._use is None else self._use()
        return use is not None and not use.done

    def holds(self, x: Tensor) -> bool:
        """Return whether calls on this tensor can be recorded and replayed here and now."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def recording(self, device: torch.device) -> Iterator[None]:
        """Prepare `warm_up` and `record`; random numbers drawn by them do not change those that follow."""
        devices = [device] if device.type == "cuda" else []
        with on_device(device), torch.random.fork_rng(devices=devices):
            yield

    def warm_up(self, call: Callable[[], object]) -> None:
        """Call twice, to compile kernels and initialize libraries, which cannot be recorded."""
        stream = self._own_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, call: Callable[[], Sequence[Tensor | None]]) -> tuple[Sequence[Tensor | None], Callable[[], None]]:
        """Record a call as a CUDA graph.

        Returns:
            The tensors that the call returned, and a function that computes their values anew, in place.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not "global": then the pinned memory that a DataLoader's thread allocates meanwhile ends the capture, and that thread.
        # torch.cuda.make_graphed_callables takes no other mode before torch 2.14.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._own_stream(), capture_error_mode="thread_local"):
            results = call()
        return results, graph.replay

    def _own_stream(self) -> Any:
        if self._stream is None:  # forward and backward must be recorded on one stream
            self._stream = torch.cuda.Stream()
        return self._stream

    def _begin(self) -> _Use:
        use = _Use()
        self._use = weakref.ref(use)
        return use


class _Use:
    """A replayed forward pass; the autograd graph holds it, so that it disappears with an autograd graph that is not used."""

    done = False


class RecordedForward:
    """Replay a function without its backward pass.

    Args:
        function: takes and returns tensors.
        inputs: tensors like those of later calls.
        memory: where the graph is recorded.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors, memory: GraphMemory) -> None:
        self._inputs = [y.detach().clone() for y in inputs]
        memory.warm_up(lambda: function(*self._inputs))
        self._outputs, self._replay = memory.record(lambda: function(*self._inputs))

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """Return the outputs, which the next call overwrites."""
        _fill(self._inputs, inputs)
        self._replay()
        return self._outputs


class RecordedStep:
    """Replay a function and its backward pass.

    The differences from `torch.cuda.make_graphed_callables`:

    - The gradients are copies. `make_graphed_callables` returns its own buffers; a parameter without a gradient takes such a
      buffer as its `.grad`, so that the next backward pass overwrites what should be accumulated (pytorch #181723).
    - It is recorded with aliases of the parameters. Those themselves have autograd nodes on the stream of an earlier pass (the
      full branch, DistributedDataParallel), which a capture must not wait for.
    - The capture survives what other threads do meanwhile, see `GraphMemory.record`.

    Args:
        function: takes the parameters as a list, then the inputs, and returns tensors.
        parameters: tensors that require gradients, at addresses that do not change.
        inputs: tensors like those of later calls; they require gradients as these do.
        memory: where the graphs are recorded.
    """

    def __init__(self, function: Callable[..., Tensors], parameters: Tensors, inputs: Tensors, memory: GraphMemory) -> None:
        self._memory, self._parameters = memory, parameters
        aliases = [p.detach().requires_grad_() for p in parameters]
        self._inputs = [y.detach().clone().requires_grad_(y.requires_grad) for y in inputs]
        leaves = [y for y in (*self._inputs, *aliases) if y.requires_grad]
        made: list[Tensor] = []

        def forward() -> tuple[Tensor, ...]:
            made[:] = function(aliases, *self._inputs)
            return tuple(made)

        def backward() -> tuple[Tensor | None, ...]:
            outputs = [y for y in made if y.requires_grad]
            return torch.autograd.grad(outputs, leaves, self._grads, allow_unused=True) if outputs else ()

        def both() -> None:
            self._grads = [torch.zeros_like(y) for y in forward() if y.requires_grad]
            backward()
            made.clear()

        memory.warm_up(both)
        outputs, self._forward = memory.record(forward)
        self._outputs = [y.detach() for y in outputs if y is not None]
        self._differentiable = [y.requires_grad for y in made]
        grads, self._backward = memory.record(backward) if self._grads else ((), lambda: None)
        made.clear()  # with the autograd graph
        found = iter(grads)
        surface = (*self._inputs, *parameters)
        self._leaf_grads = [next(found, None) if y.requires_grad else None for y in surface]

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """Return the outputs, which the next call overwrites; `GraphMemory.busy` must be False."""
        outputs: Sequence[Any] = _Replayed.apply(self, len(inputs), *inputs, *self._parameters)
        return outputs

    def _run_forward(self, inputs: Tensors) -> tuple[Tensor, ...]:
        _fill(self._inputs, inputs)
        self._forward()
        return tuple(y.detach() for y in self._outputs)

    def _run_backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        given = [grad for grad, needed in zip(grads, self._differentiable) if needed]
        for place, grad in zip(self._grads, given):
            place.zero_() if grad is None else place.copy_(grad)
        self._backward()
        return tuple(None if grad is None else grad.clone() for grad in self._leaf_grads)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: RecordedStep, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = step._run_forward(tensors[:inputs])
        ctx.step, ctx.use = step, step._memory._begin() if any(ctx.needs_input_grad) else None
        ctx.mark_non_differentiable(*[y for y, wanted in zip(outputs, step._differentiable) if not wanted])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.use.done:
            raise RuntimeError("a replayed graph has one backward pass per forward pass; do not retain it for a second one")
        ctx.use.done = True
        return None, None, *ctx.step._run_backward(grads)


def _fill(places: Tensors, values: Tensors) -> None:
    for place, value in zip(places, values):
        with torch.no_grad():
            place.copy_(value, non_blocking=True)

"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn


class WeightEMA:
    """Moving average of a module's parameters and buffers; its decay starts at 0 and grows, so that short runs have one too.

    Args:
        module: what is averaged.
        decay: where the decay ends.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self._ema = ModelEmaV3(module, decay=decay, use_warmup=True)

    def update(self, step: int) -> None:
        """Take in the weights after the optimizer's step number `step`, counted from 1."""
        self._ema.update(self.module, step=step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the averaged weights inside of the `with`."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        for mine, average in zip(_tensors(self.module), _tensors(self._ema.module)):
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)

    def save(self, path: Path) -> None:
        save_file(tensors_of(self._ema.module), path)

    def load(self, path: Path) -> None:
        self._ema.module.load_state_dict(load_file(path))


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as safetensors takes it: contiguous, and no two names for one piece of memory."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in module.state_dict().items()}


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())  # each once, also where two layers share it

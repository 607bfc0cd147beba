"""Exponential moving average of the weights."""

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
    """Exponential moving average of a module's parameters and buffers, with warm-up of the decay for short runs.

    Args:
        module: the module whose weights are averaged.
        decay: final decay; it grows from 0.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self._ema = ModelEmaV3(module, decay=decay, use_warmup=True)

    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`, counted from 1."""
        self._ema.update(self.module, step=step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the module the averaged weights inside the `with` block."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap the module's weights with their average, in place."""
        for mine, average in zip(_tensors(self.module), _tensors(self._ema.module)):
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)

    def save(self, path: Path) -> None:
        """Save the average as safetensors."""
        save_file(tensors_of(self._ema.module), path)

    def load(self, path: Path) -> None:
        """Load an average that `save` wrote."""
        self._ema.module.load_state_dict(load_file(path))


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict as safetensors accepts it: contiguous tensors that share no memory."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in module.state_dict().items()}


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())  # shared tensors only once

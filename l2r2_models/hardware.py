"""What this machine computes fast."""

from __future__ import annotations

import torch

VIEWS_PER_THREAD = 4  # per forward pass on a CPU; the activations of more views do not fit its caches (docs/guides/speed.md)


def has_bf16(device: torch.device) -> bool:
    """Whether a device has bfloat16 instructions: CUDA GPUs from Ampere on, and CPUs with AVX512-BF16 or AMX.

    >>> has_bf16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private; without them, the answer is no
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def rows_per_pass(device: torch.device, most: int, branches: int = 1) -> int:
    """Return how many rows to run through a network at once, without gradients.

    Args:
        device: device of the network.
        most: the number of rows at hand, which is the answer on a GPU.
        branches: views per row.

    >>> rows_per_pass(torch.device("meta"), 32)
    32
    """
    if device.type != "cpu":
        return most
    return max(1, min(most, VIEWS_PER_THREAD * torch.get_num_threads() // max(1, branches)))

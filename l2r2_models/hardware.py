"""What this machine computes fast."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether a device has bfloat16 instructions: CUDA GPUs from Ampere on, and CPUs with AVX512-BF16 or AMX.

    >>> has_bf16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private; without them, the answer is no
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)

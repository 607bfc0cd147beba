"""What the ops of this package share: the namespace they are registered in, and two contexts to run in."""

from __future__ import annotations

import contextlib

import torch

try:  # kernel-builder writes _ops.py, so that two versions loaded from the Hub do not meet in one namespace
    from ._ops import add_op_namespace_prefix as add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(op_name: str) -> str:
        return f"l2r2_kernels::{op_name}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current CUDA device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """An op has chosen its dtypes; autocast, which stays on inside an op, would take its matrix products to 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

"""Shared by all ops: the namespace in which they are registered, and two context managers."""

from __future__ import annotations

import contextlib

import torch

try:  # kernel-builder writes _ops.py, so that two versions loaded from the Hub have different namespaces
    from ._ops import add_op_namespace_prefix as add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(op_name: str) -> str:
        return f"l2r2_kernels::{op_name}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the tensors' device current, because Triton launches on the current CUDA device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Disable autocast, which stays on inside an op and would compute its matrix products in 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

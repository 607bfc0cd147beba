"""Work shared by the processes of torchrun: run on every rank, or on rank 0, and report errors once."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

from .errors import L2R2Error

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the other ranks wait while rank 0 reads all images


def world() -> int:
    """Return the number of processes, as set by torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the rank of this process; rank 0 writes and prints."""
    return int(os.environ.get("RANK", "0"))


def together(work: Callable[[], T]) -> T:
    """Run `work` on every rank; an error on any rank ends all of them and is reported once.

    Args:
        work: called without arguments.

    Returns:
        The result of `work` on this rank.

    Raises:
        L2R2Error: when `work` raised it on this rank, and on no lower one.
        SystemExit: when a lower rank, or only another rank, raised.
    """
    if world() == 1:
        return work()
    _join()
    errors: list[str | None] = [None] * world()
    found, error = None, None
    try:
        found = work()
    except L2R2Error as raised:
        error = raised
    torch.distributed.all_gather_object(errors, None if error is None else str(error))
    failed = next((i for i, text in enumerate(errors) if text is not None), None)
    if failed is None:
        return found  # type: ignore[return-value]
    if error is not None and failed == rank():
        raise error
    raise SystemExit(1)


def on_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only; every rank waits for its result and returns it.

    Raises:
        L2R2Error: when `work` raised it, on rank 0.
        SystemExit: when `work` raised, on every other rank.
    """
    found = together(lambda: work() if rank() == 0 else None)
    if world() > 1:
        box = [found]
        torch.distributed.broadcast_object_list(box, 0)
        found = box[0]
    return found  # type: ignore[return-value]


def _join() -> None:
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)

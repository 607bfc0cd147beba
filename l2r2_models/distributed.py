"""One run on several processes (torchrun): what all do, what the first does alone, and one error said once."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch

from .errors import L2R2Error

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the others wait while the first one reads all images


def world() -> int:
    """How many processes train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process; 0 writes and prints."""
    return int(os.environ.get("RANK", "0"))


def together(work: Callable[[], T]) -> T:
    """`work()` on every process. An error of any one ends all, and only the first that met it says so.

    Raises:
        L2R2Error: `work` raised it here.
        SystemExit: it was raised on another process.
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
    """`work()` on process 0 alone; all get its result, and wait for it.

    Raises:
        L2R2Error, SystemExit: see `together`.
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

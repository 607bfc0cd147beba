"""Connections to Ray, which is imported here only, when it is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import L2R2Error

INSTALL = 'The engine ray needs Ray Data: pip install "l2r2-models[ray]".'
BLOCK = 4_000_000  # bytes; larger blocks would delay the results and need a larger object store


def import_ray() -> Any:
    """Import `ray` and `ray.data`.

    Raises:
        L2R2Error: when Ray is missing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # these are read on import
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else lines from C++ appear between ours
    for name in ("ray._private.authentication", "ray.data._internal.progress"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hints about settings that are made here
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise L2R2Error(INSTALL) from error
    return ray


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """Yield `ray`, connected to a cluster; a connection that the caller has already made is used and stays open.

    Args:
        address: the cluster, as for `ray.init`; by default the environment variable `RAY_ADDRESS`, or else a cluster on this
            machine that ends with the block.

    Raises:
        L2R2Error: when Ray is missing or no cluster answers at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="warning", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise L2R2Error(
            f"{address}: no Ray cluster answers here; check --address or start one with `ray start --head`."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def quiet(ray: Any) -> Iterator[None]:
    """Run Ray Data in small blocks and without its own progress bars; an L2R2Error in a worker is raised as such."""
    context = ray.data.DataContext.get_current()
    names = ("enable_progress_bars", "print_on_execution_start", "target_max_block_size")
    before = {name: getattr(context, name) for name in names}
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = BLOCK
    try:
        yield
    except ray.exceptions.RayError as error:
        if (ours := _ours(error)) is None:
            raise
        raise L2R2Error(ours) from None
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _ours(error: BaseException | None) -> str | None:
    """Return the message of the L2R2Error that caused an error, if one did."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, L2R2Error):
            return str(error)
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None

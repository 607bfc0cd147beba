"""Connections to Ray, which is imported here only, when it is used, and the spreading of work over its workers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import L2R2Error

INSTALL = 'The engine ray needs Ray Data: pip install "l2r2-models[ray]".'
Work = Sequence[Mapping[str, Any]]
NO_CLUSTER = "{}: no Ray cluster answers here; check --address or start one with `ray start --head`."
PATIENCE = 10  # seconds for an answer of a cluster
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # the first frame of both sides of HTTP/2; byte 3 is its type
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
CLIENT, CLIENT_PORT = "ray://", 10001
BLOCK = 4_000_000  # bytes; larger blocks would delay the results and need a larger object store


@dataclass(frozen=True)
class Engine:
    """A Ray cluster, and how many of its workers to use.

    Attributes:
        address: the cluster, see `connected`.
        actors: number of workers that hold a model; None for one per GPU, or per core if the cluster has no GPU.

    Raises:
        L2R2Error: when the number is not positive.
    """

    address: str | None = None
    actors: int | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and self.actors < 1:
            raise L2R2Error(f"The number of workers (--workers) must be at least 1, got {self.actors}.")

    def run(
        self,
        work: Work,
        plan: Any,
        stage: type,
        apart: Sequence[type] = (),
        decode_apart: bool | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows that workers make of each piece of work, as they arrive; the work of a lost worker is done again.

        Args:
            work: rows.
            plan: first argument of the stages.
            stage: class that is created once per worker with the plan and its number of threads, and called with batches of one
                row. The call is a generator, because Ray does not pass on the cause of an error in a plain function.
            apart: two such classes to use instead, one for workers that decode, and one for those that hold the model.
            decode_apart: whether to use `apart`; by default, if the cluster has GPUs.

        Raises:
            L2R2Error: when no cluster answers, or a worker raised one.
        """
        if not work:
            return
        with connected(self.address) as ray, quiet(ray):
            resources = ray.cluster_resources()
            gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
            count = min(self.actors or gpus or cores, len(work))
            holding = {"num_gpus": 1} if gpus else {"num_cpus": 1}

            def through(data: Any, stage: type, size: int, threads: int = 0, **resources: int) -> Any:
                # goes on with fewer workers if a node is lost
                pool = ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size)
                return data.map_batches(stage, compute=pool, fn_constructor_args=(plan, threads), batch_size=1, **resources)

            data = ray.data.from_items(list(work), override_num_blocks=len(work))
            if apart and (gpus > 0 if decode_apart is None else decode_apart):
                data = through(data, apart[0], max(1, cores - (0 if gpus else count)), num_cpus=1)
                data = through(data, apart[1], count, **holding)
            else:
                data = through(data, stage, count, threads=cores // gpus if gpus else 0, **holding)
            for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
                names = list(batch)
                for row in zip(*batch.values()):
                    yield dict(zip(names, row))


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


def check_address(address: str) -> None:
    """Check that a gRPC server, which Ray's are, answers at the address of a cluster, since Ray itself would try for minutes.

    An address without a port (`auto`, `local`) is left to Ray; with `RAY_USE_TLS`, it is only checked that something listens.

    Raises:
        L2R2Error: when none answers, or the port is not a number.
    """
    of_client = address.startswith(CLIENT)
    try:
        place = urlsplit(address if of_client else f"//{address}")
        host, port = place.hostname, place.port or (CLIENT_PORT if of_client else None)
    except ValueError:
        raise L2R2Error(f"{address}: is not the address of a Ray cluster; use HOST:PORT or ray://HOST:PORT.") from None
    if host is None or port is None:
        return
    try:
        with socket.create_connection((host, port), PATIENCE) as connection:
            connection.sendall(HTTP2)
            answer = b"" if os.environ.get("RAY_USE_TLS", "0") == "0" else SETTINGS
            while len(answer) < 4 and (more := connection.recv(4 - len(answer))):
                answer += more
    except (OSError, UnicodeError):  # a name of more than 63 characters
        answer = b""
    if answer[3:4] != SETTINGS[3:4]:
        raise L2R2Error(NO_CLUSTER.format(address))


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
    check_address(address)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="warning", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise L2R2Error(NO_CLUSTER.format(address)) from error
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

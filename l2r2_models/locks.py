"""One writer per resumable output; a second process gets an error that names the first.

The lock is an flock on a file next to the output. The kernel releases it when its process ends, even by SIGKILL, so it is never
stale; on NFS the server holds it, so that it works across hosts. The content of the lock file is only informative.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import L2R2Error
from .io import remove_stale

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None  # type: ignore[no-redef]

NO_LOCK = "%s: cannot be locked (%s); make sure that no other process writes to it"
logger = logging.getLogger(__name__)
_held: set[int] = set()


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold the lock of an output file or folder, and remove temporary files that a killed writer left next to it.

    Raises:
        L2R2Error: when another process is writing the output, or its folder cannot be written to.
    """
    place = Path(os.path.abspath(out))  # a folder may be "."
    lock = place.with_name(f"{place.name}.lock")
    handle = _take(out, lock)
    if handle is None:
        yield
        return
    _held.add(handle)
    try:
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        with contextlib.suppress(OSError):  # if the disk is full, writing the output itself reports it
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on host {socket.gethostname()} since {since}".encode())
            remove_stale(place)
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        _held.discard(handle)
        os.close(handle)


def _take(out: Path, lock: Path) -> int | None:
    """The open, locked file; None if the output folder is writable but its parent is not (a mounted volume)."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if out.is_dir() and os.access(out, os.W_OK):
                logger.warning(NO_LOCK, out, error.strerror)
                return None
            raise L2R2Error(f"{out}: cannot be written ({error.strerror or error}).") from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            raise L2R2Error(_taken(out, lock, holder)) from None
        except OSError as error:
            logger.warning(NO_LOCK, out, error.strerror)
            return handle
        with contextlib.suppress(FileNotFoundError):  # the previous writer removed it after we opened it: try again
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle
        os.close(handle)


def _taken(out: Path, lock: Path, holder: str) -> str:
    elsewhere = "" if f" on host {socket.gethostname()} " in holder else f" If that host is gone for good, remove {lock}."
    return f"{out} is being written by {holder}; wait for it to finish, or choose another output.{elsewhere}"


def _let_go() -> None:
    """Close inherited handles: a forked data-loading worker would keep the lock after its parent has ended."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

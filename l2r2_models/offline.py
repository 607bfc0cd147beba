"""Downloads on a machine without network access: the cache at once, instead of a minute of retries."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 2.0  # how long to wait for the name of the Hub's server to be resolved


@contextlib.contextmanager
def cache_if_offline() -> Iterator[None]:
    """Let huggingface_hub use only its cache inside the `with` block, if the Hub's server cannot be found.

    Nothing changes behind a proxy, which resolves names itself, and with HF_HUB_OFFLINE.

    >>> with cache_if_offline():
    ...     pass
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies() or _is_found(urlsplit(constants.ENDPOINT).hostname or ""):
        yield
        return
    constants.HF_HUB_OFFLINE = True  # read at every request
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _is_found(host: str) -> bool:
    found = []

    def resolve() -> None:
        with contextlib.suppress(OSError):
            found.append(socket.getaddrinfo(host, None))

    thread = threading.Thread(target=resolve, daemon=True)  # a resolver may wait longer for its servers
    thread.start()
    thread.join(SECONDS)
    return bool(found)

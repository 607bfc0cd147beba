"""Run the application on a socket until Ctrl-C."""

from __future__ import annotations

import logging
import socket
from importlib.util import find_spec
from typing import Any

from ..errors import L2R2Error

SECONDS = 10


def check_installed(extra: str, *modules: str) -> None:
    """Check that the packages of an optional dependency are installed.

    Raises:
        L2R2Error: when one is missing.
    """
    if not all(map(find_spec, modules)):
        raise L2R2Error(f'`l2r2 {extra}` needs more packages: pip install "l2r2-models[{extra}]".')


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Open the socket of the server; return it with its URL.

    Args:
        host: name or address of the interface.
        port: its port; 0 for any free one.

    Raises:
        L2R2Error: when the address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.create_server(address[:2], family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise L2R2Error(f"{host}:{port}: cannot be used ({why}); choose another --host or --port.") from None
    shown = f"[{host}]" if ":" in host else host
    return opened, f"http://{shown}:{opened.getsockname()[1]}/"


def serve(app: Any, opened: socket.socket, seconds: int = SECONDS) -> None:
    """Serve the application until SIGINT or SIGTERM, then raise the signal again; requests get `seconds` to finish."""
    import uvicorn

    log = logging.getLogger("uvicorn.error")
    log.setLevel(logging.ERROR)  # not a line for every malformed request

    class Server(uvicorn.Server):
        async def shutdown(self, *arguments: Any, **options: Any) -> None:
            log.setLevel(logging.CRITICAL)  # nor a traceback for every connection that is still open then
            await super().shutdown(*arguments, **options)

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=seconds, lifespan="on"
    )
    Server(config).run(sockets=[opened])

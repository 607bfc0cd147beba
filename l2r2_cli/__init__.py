"""The first steps of the `l2r2` command: Ctrl-C is quiet from here on, before anything slow is imported.

A package of its own, because `import l2r2_models` registers the models with timm, which takes seconds.
"""

import os
import signal
import sys

INTERRUPTED = "interrupted; the same command (without --overwrite) continues"


class Interrupted(BaseException):
    """Ctrl-C. Not a KeyboardInterrupt, which the option parser would take for itself."""


def main() -> None:
    """Entry point of `l2r2`: an interruption is one line and exit status 130."""
    signal.signal(signal.SIGINT, _leave)
    from .commands import main as run

    own = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() != own:
            raise KeyboardInterrupt  # in a worker, whose own code knows it
        signal.signal(signal.SIGINT, _leave)  # a second Ctrl-C does not wait for anything
        raise Interrupted

    try:
        signal.signal(signal.SIGINT, stop)
        try:
            run()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done, and Python's shutdown would be killed without a word
    except Interrupted:
        sys.stdout.flush()
        print(file=sys.stderr)  # a progress bar may stand on the line
        import multiprocessing  # not before the handler is set

        for worker in multiprocessing.active_children():
            worker.kill()
        _leave()  # all is unwound; threads and workers of libraries would be waited for


def _leave(*_: object) -> None:
    sys.stderr.flush()
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)

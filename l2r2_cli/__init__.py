"""Entry point of the `l2r2` command, which handles Ctrl-C before anything slow is imported.

This is a separate package, because `import l2r2_models` registers the models with timm, which takes seconds.
"""

import os
import signal
import sys

INTERRUPTED = "interrupted; run the same command (without --overwrite) to continue"


class Interrupted(BaseException):
    """Ctrl-C; not a KeyboardInterrupt, which the option parser would catch. Its text replaces the line that is printed."""


def main() -> None:
    """Run `l2r2`; an interruption prints one line and exits with status 130."""
    signal.signal(signal.SIGINT, _leave)
    from .commands import main as run

    own = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() != own:
            raise KeyboardInterrupt  # in a worker, whose code handles it
        signal.signal(signal.SIGINT, _leave)  # a second Ctrl-C exits at once
        raise Interrupted

    try:
        signal.signal(signal.SIGINT, stop)
        try:
            run()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done; do not interrupt Python's shutdown
    except Interrupted as interruption:
        sys.stdout.flush()
        print(file=sys.stderr)  # the line may contain a progress bar
        import multiprocessing  # not before the handler is set

        for worker in multiprocessing.active_children():
            worker.kill()
        _exit(str(interruption) or INTERRUPTED)  # cleanup is done; do not wait for threads and workers of libraries


def _leave(*_: object) -> None:
    _exit(INTERRUPTED)


def _exit(line: str) -> None:
    sys.stderr.flush()
    os.write(2, f"{line}\n".encode())
    os._exit(130)

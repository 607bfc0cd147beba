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
    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensors.

    By default, glibc returns large blocks to the system at once. The page faults of getting them back take
    a noticeable part of the time of a convolutional network on a CPU.
    """
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _leave(*_: object) -> None:
    _exit(INTERRUPTED)


def _exit(line: str) -> None:
    sys.stderr.flush()
    os.write(2, f"{line}\n".encode())
    os._exit(130)

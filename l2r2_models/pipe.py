"""Process items in threads ahead of the caller, in order and with bounded memory.

Threads rather than processes: decoding and resizing release the global interpreter lock, nothing is copied between processes, and
threads start immediately.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .errors import L2R2Error

T = TypeVar("T")
R = TypeVar("R")
MAX_WORKERS = 16  # of the default; few GPUs are faster than 16 decoders
HELD = 50_000_000  # limit of the sum of `weigh`, usually pixels: about 150 MB


def worker_count(workers: int | None = None) -> int:
    """Return the number of threads: `workers`, or by default one per core that this process may use.

    Raises:
        L2R2Error: when it is negative.

    >>> worker_count(3)
    3
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, MAX_WORKERS)
    if workers < 0:
        raise L2R2Error(f"workers must be 0 (no threads) or more, got {workers}.")
    return workers


def in_order(
    work: Callable[[T], R],
    items: Iterable[T],
    workers: int | None = None,
    *,
    ahead: int = 0,
    weigh: Callable[[R], int] = lambda _: 0,
) -> Iterator[R]:
    """Yield `work(item)` for each item, in the order of the items; an exception in `work` is raised when its item is due.

    Args:
        work: called in the threads, or by the caller if there are none.
        items: read in the thread of the caller, no further than needed.
        workers: see `worker_count`.
        ahead: number of results to hold beyond two per thread.
        weigh: size of a result. So many are held as are expected to weigh `HELD`, judging by those before, but at least one per
            thread.

    >>> list(in_order(len, ["a", "bb", ""], 2))
    [1, 2, 0]
    """
    count = worker_count(workers)
    if count == 0:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    source, pool = iter(items), ThreadPoolExecutor(count, thread_name_prefix="l2r2-pipe")
    weight = done = last = 0
    try:
        more = True
        while more or waiting:
            # pending results have no weight yet; assume the mean so far, or that of the last one if it is larger
            expected = max(weight / max(done, 1), last)
            most = 2 * count + ahead if done else count
            most = max(count, min(most, int(HELD / expected))) if expected else most
            while more and len(waiting) < most:
                try:
                    waiting.append(pool.submit(work, next(source)))
                except StopIteration:
                    more = False
            if waiting:
                result = waiting.popleft().result()
                last = weigh(result)
                weight, done = weight + last, done + 1
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error or an interruption, drop the rest

"""Work on one image after another in threads, ahead of who uses it: in order, and bounded in what is held.

Threads and not processes, because decoding and resizing release Python's lock, nothing is copied between processes, and a thread
starts at once.
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
MOST_WORKERS = 16  # by default; a GPU is seldom faster than so many decoders
HELD = 50_000_000  # of what `weigh` counts, usually pixels: about 150 MB


def worker_count(workers: int | None = None) -> int:
    """The number of threads: as given, or one per core that this process may use.

    Raises:
        L2R2Error: when it is negative.

    >>> worker_count(3)
    3
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, MOST_WORKERS)
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
    """Yield `work(item)` for each item, in the order of the items; what it raises is raised in the item's place.

    Args:
        work: runs in the threads, or in the caller's where there are none.
        items: read in the caller's thread, no further than needed.
        workers: see `worker_count`.
        ahead: results to have ready beyond one per thread.
        weigh: size of a result; no more results are held than weigh `HELD`, but for one per thread.

    >>> list(in_order(len, ["a", "bb", ""], 2))
    [1, 2, 0]
    """
    count = worker_count(workers)
    if count == 0:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    source, pool = iter(items), ThreadPoolExecutor(count, thread_name_prefix="l2r2-pipe")
    weight = done = 0
    try:
        more = True
        while more or waiting:
            # what is under way has no weight yet, so that of a result is taken to be the mean of those before
            fitting = HELD * done // weight if weight else (2 * count + ahead if done else count)
            most = max(count, min(fitting, 2 * count + ahead))
            while more and len(waiting) < most:
                try:
                    waiting.append(pool.submit(work, next(source)))
                except StopIteration:
                    more = False
            if waiting:
                result = waiting.popleft().result()
                weight, done = weight + weigh(result), done + 1
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error or an interruption, nobody wants the rest

"""Make the rows of the speed table: check, time and compare the providers.

``ratio`` is the peer's time divided by ours, in our own row for the fastest peer; ``must`` and ``stretch`` are the target ratios
(a goal of at most 1.15 times the peer's time is a ratio of 1 / 1.15). Every provider is compared with float64 before it is timed;
a wrong, failing or missing one has no times, and a note says why.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Goal(NamedTuple):
    must: float | None = None
    stretch: float | None = None
    peers: tuple[str, ...] = ()  # peers that the goal refers to; any if empty


class Case:
    """One line of the goal table: the providers' calls over rotating inputs, ours first."""

    def __init__(self, op: str, case: str, device: torch.device, repeats: int, goal: Goal, bytes_: float, flops: float):
        self.op, self.case, self.device, self.repeats, self.goal = op, case, device, repeats, goal
        self.bytes, self.flops = bytes_, flops
        self.times: dict[str, list[float]] = {}
        self.correct: dict[str, bool] = {}
        self.notes: dict[str, str] = {}

    def add(self, provider: str, make: Callable[[], tuple[list[Call], Callable[[], bool]]]) -> None:
        """Check, then time the calls from ``make``; one that cannot run here has no times, and the other rows go on."""
        self.correct[provider], self.times[provider] = False, []
        try:
            calls, check = make()
            _leave_nan_in_free_memory(self.device)
            self.correct[provider] = check()
            if self.correct[provider]:
                self.times[provider] = timed(calls, self.device, self.repeats)
            else:
                self.notes[provider] = "wrong result"
        except Exception as error:  # of compilers, drivers and absent packages
            self.correct[provider], self.times[provider] = False, []
            self.notes[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def stand_in(self, name: str, times: list[float]) -> None:
        """Add times to compare with that are not a provider's, e.g. a fraction of the copy rate; ignored if ours is wrong."""
        self.correct[name], self.times[name] = self.correct["l2r2"], times

    def rows(self, copy_rate: float, matmul_rate: float) -> Iterator[dict]:
        median = {provider: statistics.median(times) for provider, times in self.times.items() if times}
        ours = median.get("l2r2")
        rivals = [t for p, t in median.items() if p != "l2r2" and (not self.goal.peers or p in self.goal.peers)]
        for provider, times in self.times.items():
            ms, own = median.get(provider), provider == "l2r2"
            against = min(rivals, default=None) if own else ms
            quantiles = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [None] * 4
            yield {
                "op": self.op,
                "case": self.case,
                "provider": provider,
                "ms_median": ms,
                "ms_p20": quantiles[0],
                "ms_p80": quantiles[3],
                "bytes": self.bytes,
                "flops": self.flops,
                "pct_copy": 100 * self.bytes / (ms * 1e-3) / copy_rate if ms else None,
                "pct_matmul": 100 * self.flops / (ms * 1e-3) / matmul_rate if ms else None,
                "ratio": against / ours if against and ours else None,
                "must": self.goal.must if own else None,
                "stretch": self.goal.stretch if own else None,
                "correct": self.correct[provider],
                "note": self.notes.get(provider, ""),
            }


def timed(calls: list[Call], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, taken in turn; on CUDA by events, with the host kept ahead of the GPU."""
    for call in calls * 3 if device.type == "cuda" else calls[:1]:
        call()
    if device.type != "cuda":
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (start, end) in enumerate(marks):
        if i % 5 == 0:
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host queues the next calls
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _leave_nan_in_free_memory(device: torch.device) -> None:
    """Fill free memory with NaN, so that an output that a kernel does not write is not the result of an earlier call."""
    if device.type == "cuda":
        torch.full((1 << 30,), float("nan"), device=device)

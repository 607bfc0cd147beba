"""Branch logits of a data set, computed on Ray Data, for `l2r2 evaluate`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.dataset import ViewDataset
from ..evaluate.logits import Compute, Progress, compute_logits, joined
from ..models.l2r2 import L2R2
from .engine import Engine
from .stages import Row

BATCHES = 8  # per piece of work


@dataclass(frozen=True)
class LogitsPlan:
    """The arguments of `compute_logits` that all workers share."""

    model: L2R2
    batch_size: int
    skip_bad: bool


class Logits:
    """Compute the branch logits of some rows in one worker."""

    def __init__(self, plan: LogitsPlan, threads: int = 0) -> None:
        self.plan, self.threads = plan, threads

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[Row]:
        """Yield the logits of each piece of work, with the row that it starts at."""
        for start, data in zip(batch["start"], batch["data"]):
            yield {"start": [start], "data": [pickle.dumps(self._logits(pickle.loads(data)))]}

    def _logits(self, items: ViewDataset) -> dict[str, Tensor]:
        plan = self.plan
        return compute_logits(plan.model, items, plan.batch_size, plan.skip_bad, self.threads, lambda batches, _: batches)


def logits_on_ray(address: str | None = None, actors: int | None = None) -> Compute:
    """Return the argument `compute` of `judge_run` and `evaluate_run` that computes the branch logits on Ray Data.

    The logits are those of one process up to rounding, and exactly those of one that computes with one thread. Workers get the
    model from the process that calls, and read the images themselves.

    Args:
        address: Ray cluster to connect to, see `engine.connected`.
        actors: number of workers; by default one per GPU, or per core if the cluster has no GPU.

    Raises:
        L2R2Error: when the number of workers is not positive.

    >>> evaluate_run("runs/traps", "data/", "test", compute=logits_on_ray())  # doctest: +SKIP
    """
    engine = Engine(address, actors)

    def compute(
        model: L2R2, items: ViewDataset, batch_size: int, skip_bad: bool, workers: int | None, progress: Progress
    ) -> dict[str, Tensor]:
        size = BATCHES * batch_size
        starts = range(0, len(items), size)
        work = [{"start": start, "data": pickle.dumps(items.part(start, start + size))} for start in starts]
        plan = LogitsPlan(model, batch_size, skip_bad)
        found: dict[int, dict[str, Tensor]] = {}  # by start, so that what arrives twice counts once
        for row in progress(engine.run(work, plan, Logits), len(work)):
            start, part = int(row["start"]), pickle.loads(row["data"])
            found[start] = {**part, "used": part["used"] + start}
        return joined([found[start] for start in starts])

    return compute

"""The changed images of an audit, classified on Ray Data, for `l2r2 audit`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..audit.run_model import Compute, Task, answers_of
from .engine import Engine
from .stages import Row

IMAGES = 16  # per piece of work; each is changed some 40 times


class Answer:
    """Classify the changed images of some subjects in one worker."""

    def __init__(self, plan: Task, threads: int = 0) -> None:
        self.plan, self.threads = plan, threads

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[Row]:
        """Yield the index of each subject and what the model predicts for it."""
        for data in batch["data"]:
            for i, row in answers_of(self.plan, pickle.loads(data), self.threads):
                yield {"subject": [i], "data": [pickle.dumps(row)]}


def answers_on_ray(address: str | None = None, actors: int | None = None) -> Compute:
    """Return the argument `compute` of `audit` and `run_audit` that classifies the changed images on Ray Data.

    Noise and backgrounds are those of one process, because they are drawn per image; the logits differ by rounding at most.
    Workers get the model from the process that calls, and read the images themselves.

    Args:
        address: Ray cluster to connect to, see `engine.connected`.
        actors: number of workers; by default one per GPU, or per core if the cluster has no GPU.

    Raises:
        L2R2Error: when the number of workers is not positive.

    >>> audit("timm:resnet18", "data/", compute=answers_on_ray())  # doctest: +SKIP
    """
    engine = Engine(address, actors)

    def compute(task: Task, todo: Sequence[int], workers: int) -> Iterator[tuple[int, Tensor]]:
        work = [{"data": pickle.dumps(list(todo[start : start + IMAGES]))} for start in range(0, len(todo), IMAGES)]
        for row in engine.run(work, task, Answer):
            yield int(row["subject"]), pickle.loads(row["data"])

    return compute

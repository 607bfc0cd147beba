"""Batches of rows that do not depend on the number of processes, accumulation steps or interruptions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batch sampler of one process; yields the row indices of the parts of each batch, one part at a time.

    The order of an epoch depends only on seed and epoch. A last batch with fewer than two rows per process is dropped, because
    batch norm needs two rows.

    Args:
        targets: class index of each row.
        batch_size: rows per batch, over all processes and parts.
        seed: random seed of the order.
        balanced: draw equally many rows per class (up to one). Rows of small classes are repeated, but none before all
            rows of its class have been drawn.
        parts: number of parts per batch; lowered if a process would get fewer than two rows per part.
        rank, world: index of this process, and number of processes.

    >>> [len(rows) for rows in EpochBatches([0, 1] * 4, batch_size=4, parts=2)]
    [2, 2, 2, 2]
    """

    def __init__(
        self,
        targets: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        balanced: bool = False,
        parts: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.targets, self.batch_size, self.seed, self.balanced = torch.tensor(targets), batch_size, seed, balanced
        self.parts, self.rank, self.world, self.epoch = parts, rank, world, 0
        self.parts = self._parts_of(batch_size)
        smallest = 2 * world
        last = len(targets) % batch_size
        self.rows = len(targets) - (last if len(targets) > batch_size and last < min(smallest, batch_size) else 0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Number of batches, and so of optimizer steps, per epoch."""
        return -(-self.rows // self.batch_size)

    def __len__(self) -> int:
        """Number of parts per epoch; only the last batch can have fewer parts than the others."""
        return (self.steps - 1) * self.parts + self._parts_of(self.rows - (self.steps - 1) * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()[: self.rows].tolist()
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            count = self._parts_of(len(batch))
            yield from (batch[part * self.world + self.rank :: count * self.world] for part in range(count))

    def order(self) -> torch.Tensor:
        """Draw the row indices `[N]` of the epoch."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(63))
        if not self.balanced:
            return torch.randperm(len(self.targets), generator=generator)
        classes = torch.unique(self.targets)
        classes = classes[torch.randperm(len(classes), generator=generator)]  # the first classes get the remaining rows
        each, more = divmod(len(self.targets), len(classes))
        drawn = []
        for i, number in enumerate(classes):
            rows, quota = (self.targets == number).nonzero()[:, 0], each + (i < more)
            rounds = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-quota // len(rows)))]
            drawn += [torch.cat(rounds)[:quota]] if rounds else []
        joined = torch.cat(drawn)
        return joined[torch.randperm(len(joined), generator=generator)]

    def _parts_of(self, rows: int) -> int:
        """Return the largest number of parts with at least two rows per process and part."""
        return max(1, min(self.parts, rows // (2 * self.world)))

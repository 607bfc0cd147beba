"""Which rows make up each batch: the same ones whatever the number of processes, of parts, or of interruptions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Row numbers of one process, part of a batch by part of a batch.

    The order of an epoch is drawn from (seed, epoch). A last batch with fewer than two rows a process is left out, because batch
    norm cannot take one row.

    Args:
        targets: class number of each row.
        batch_size: rows of a whole batch.
        seed: of the order.
        balanced: equally many rows of every class (up to one); those of small classes are repeated, none before all others
            of its class were drawn.
        parts: a batch is computed in so many parts, or in as many as leave two rows to each process in each.
        rank, world: number of this process, and of all.
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
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.batch_size)

    def __len__(self) -> int:
        """Parts of an epoch; only the last batch can have fewer of them than the others."""
        return (self.steps - 1) * self.parts + self._parts_of(self.rows - (self.steps - 1) * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()[: self.rows].tolist()
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            count = self._parts_of(len(batch))
            yield from (batch[part * self.world + self.rank :: count * self.world] for part in range(count))

    def order(self) -> torch.Tensor:
        """`[N]` row numbers of the epoch."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(63))
        if not self.balanced:
            return torch.randperm(len(self.targets), generator=generator)
        classes = torch.unique(self.targets)
        classes = classes[torch.randperm(len(classes), generator=generator)]  # who gets the rows that are left over
        each, more = divmod(len(self.targets), len(classes))
        drawn = []
        for i, number in enumerate(classes):
            rows, quota = (self.targets == number).nonzero()[:, 0], each + (i < more)
            rounds = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-quota // len(rows)))]
            drawn += [torch.cat(rounds)[:quota]] if rounds else []
        joined = torch.cat(drawn)
        return joined[torch.randperm(len(joined), generator=generator)]

    def _parts_of(self, rows: int) -> int:
        """As many parts as leave two rows to each process in each."""
        return max(1, min(self.parts, rows // (2 * self.world)))

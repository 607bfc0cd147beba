"""Batches: every row once per epoch, independent of processes and parts, balanced on request."""

from collections import Counter
from itertools import chain

import pytest

from l2r2_models.train.batches import EpochBatches


def whole_batches(targets, size, **options):
    """The rows of each step, put together from all processes and parts."""
    world = options.pop("world", 1)
    parts = EpochBatches(targets, size, world=world, **options).parts
    shares = [list(EpochBatches(targets, size, rank=r, world=world, **options)) for r in range(world)]
    assert len({len(share) for share in shares}) == 1, "a process without a step would hang the others"
    assert all(len(share) == len(EpochBatches(targets, size, world=world, **options)) for share in shares)
    joined = [list(chain(*column)) for column in zip(*shares)]
    return [sorted(chain(*joined[i : i + parts])) for i in range(0, len(joined), parts)]


@pytest.mark.parametrize("count", [6, 16, 18, 23, 29])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 8), (2, 3)])
@pytest.mark.parametrize("balanced", [False, True])
def test_processes_and_parts_share_the_batches_of_one(count, world, parts, balanced):
    targets = [i % 3 for i in range(count)]
    alone = whole_batches(targets, 8, seed=4, balanced=balanced)
    shared = whole_batches(targets, 8, seed=4, balanced=balanced, world=world, parts=parts)
    last = count % 8
    assert shared[: len(alone)] == alone or (last in (2, 3) and world == 2 and shared == alone[:-1])
    if not balanced:
        assert Counter(chain(*alone)) == Counter(range(count)) or last == 1


def test_an_order_belongs_to_its_seed_and_epoch():
    def order(seed, epoch):
        batches = EpochBatches([0] * 50, 8, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    orders = [order(*key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order(0, 1) == orders[1]


def test_balanced_epochs_have_every_class_equally_and_repeat_no_row_too_early():
    targets = [0] * 90 + [1] * 9 + [2]
    batches = EpochBatches(targets, 10, balanced=True)
    for epoch in range(3):
        batches.set_epoch(epoch)
        rows = batches.order().tolist()
        counts = Counter(targets[row] for row in rows)
        assert len(rows) == 100 and max(counts.values()) - min(counts.values()) <= 1
        times = Counter(row for row in rows if targets[row] == 1)
        assert len(times) == 9 and max(times.values()) - min(times.values()) <= 1
        assert max(Counter(row for row in rows if targets[row] == 0).values()) == 1


def test_a_last_batch_too_small_for_batch_norm_is_left_out_and_only_that():
    assert [len(b) for b in EpochBatches([0] * 9, 4)] == [4, 4]
    assert [len(b) for b in EpochBatches([0] * 10, 4)] == [4, 4, 2]
    assert [len(b) for b in EpochBatches([0], 4)] == [1]
    assert [len(b) for b in EpochBatches([0] * 3, 1)] == [1, 1, 1]
    assert [len(b) for b in EpochBatches([0] * 11, 8, parts=4)] == [2, 2, 2, 2, 3]
    assert [len(b) for b in EpochBatches([0] * 11, 8, parts=8)] == [2, 2, 2, 2, 3]  # never parts of one row

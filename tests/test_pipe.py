"""The pipe: in order, bounded, with each failure in its place."""

import threading

import pytest

from l2r2_models import pipe
from l2r2_models.errors import L2R2Error
from l2r2_models.pipe import in_order, worker_count


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_keep_the_order_of_the_items_whatever_is_done_first(workers):
    late = threading.Event()

    def work(i):
        if i == 0 and workers > 1:
            assert late.wait(60)  # until a later one is done
        if i == 2:
            late.set()
        return i * i

    assert list(in_order(work, range(20), workers)) == [i * i for i in range(20)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_place(workers):
    results = in_order(lambda i: 10 // (3 - i), range(6), workers)
    assert [next(results) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_is_read_ahead_than_asked_for():
    read = []
    results = in_order(lambda i: i, (read.append(i) or i for i in range(1000)), 2, ahead=3)
    for done in range(1, 101):
        next(results)
        assert len(read) <= done + 2 * 2 + 3
    results.close()
    assert len(read) < 110


def test_large_results_stop_the_reading(monkeypatch):
    monkeypatch.setattr(pipe, "HELD", 10)
    read = []
    results = in_order(lambda i: i, (read.append(i) or i for i in range(100)), 1, ahead=50, weigh=lambda _: 6)
    for done in range(1, 20):
        next(results)
        assert len(read) <= done + 1  # the next one, for the only thread
    assert list(results) == list(range(19, 100))


def test_threads_end_when_the_results_are_given_up():
    results = in_order(lambda i: i, range(1000), 2)
    next(results)
    results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("l2r2-pipe"):
            thread.join(10)
            assert not thread.is_alive()


def test_the_number_of_workers():
    assert worker_count(5) == 5 and 1 <= worker_count() <= 16
    with pytest.raises(L2R2Error, match="0"):
        worker_count(-1)

"""A dry run of the speed table on the CPU, with tiny sizes: every case and provider; only counts are asserted."""

import importlib
from pathlib import Path

import pytest
import torch

KEYS = ["op", "case", "provider", "ms_median", "ms_p20", "ms_p80", "bytes", "flops", "pct_copy", "pct_matmul"]
KEYS += ["ratio", "must", "stretch", "correct", "note"]


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks/speed"))
        yield importlib.import_module("masked_attention_bench")


@pytest.fixture(scope="module")
def table(bench):
    return list(bench.rows("cpu", 1e10, 1e11, bench.TINY))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_goal_has_our_correct_timed_row(table):
    assert all(list(row) == KEYS for row in table)
    ours = [row for row in table if row["provider"] == "l2r2"]
    assert len(ours) == 29 and all(row["correct"] and row["ms_median"] > 0 and row["must"] for row in ours)
    assert {row["must"] for row in ours} >= {1.0, 1 / 1.15, 1 / 1.3, 1.3, 2.5, 1 / 1.05, 1.7, 2.6, 3.5}
    graphs = [row for row in ours if row["op"] == "PackedRunner"]
    assert {row["must"] for row in graphs if "eva02" not in row["case"]} == {2.1, 3.4, 4.8, 4.0}
    assert {row["must"] for row in graphs if "eva02" in row["case"]} == {2.1, 3.4, 4.8}
    assert len({(row["op"], row["case"]) for row in ours}) == len(ours)


def test_ratios_are_against_the_fastest_peer_of_the_goal(table):
    for row in (row for row in table if row["provider"] == "l2r2" and row["ratio"] is not None):
        peers = [other["ms_median"] for other in table if other["case"] == row["case"] and other["op"] == row["op"]]
        assert any(peer is not None and peer == pytest.approx(row["ratio"] * row["ms_median"]) for peer in peers)


def test_a_wrong_or_absent_peer_is_not_timed(bench):
    case = bench.Case("op", "case", torch.device("cpu"), 3, bench.Goal(1.0), 8.0, 8.0)

    def absent():
        raise ImportError("no such peer")

    case.add("l2r2", lambda: ([lambda: None], lambda: True))
    case.add("wrong", lambda: ([lambda: None], lambda: False))
    case.add("absent", absent)
    ours, wrong, missing = case.rows(1e9, 1e9)
    assert ours["ms_median"] > 0 and ours["ratio"] is None and ours["note"] == ""
    assert wrong["ms_median"] is missing["ms_median"] is None and not wrong["correct"]
    assert (wrong["note"], missing["note"]) == ("wrong result", "ImportError: no such peer")


def test_a_failing_row_of_ours_does_not_end_the_run(bench):
    case = bench.Case("op", "case", torch.device("cpu"), 3, bench.Goal(1.0), 8.0, 8.0)

    def fails():
        raise AssertionError("out of\nregisters")

    case.add("l2r2", fails)
    case.add("peer", lambda: ([lambda: None], lambda: True))
    ours, peer = case.rows(1e9, 1e9)
    assert ours["note"] == "AssertionError: out of registers" and not ours["correct"] and ours["ms_median"] is None
    assert peer["ms_median"] > 0 and peer["ratio"] is None


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_output_or_gradient_is_found(bench, backward):
    tensors = [torch.rand(2, 3)]
    right, exact = (lambda x: x * 2), [torch.cat(tensors).double()]
    assert bench.agrees(right, tensors, right, exact, backward)
    assert not bench.agrees(lambda x: x * 2.1, tensors, right, exact, backward)
    gradient_only = bench.agrees(lambda x: x * 2.1 - 0.1 * x.detach(), tensors, right, exact, backward)
    assert gradient_only != backward


def test_masks_keep_their_share(bench):
    torch.manual_seed(0)
    (mask,) = bench.kept_masks(64, 197, 0.3, 1, torch.device("cpu"))
    counts = mask[:, 1:].sum(1) / 196
    assert mask[:, 0].all() and abs(counts.mean() - 0.3) < 0.01 and counts.min() >= 0.14 and counts.max() <= 0.46

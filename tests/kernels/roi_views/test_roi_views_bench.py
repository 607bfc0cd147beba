"""The speed table: a dry run of its rows on small images, and what the driver says without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SPEED = Path(__file__).parents[3] / "benchmarks" / "speed"
KEYS = {
    "op", "case", "provider", "ms_median", "ms_p20", "ms_p80", "bytes", "flops", "pct_copy", "pct_matmul", "ratio", "must",
    "stretch", "correct",
}  # fmt: skip


def test_every_row_is_right_and_has_its_goal(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    import roi_views_bench as bench

    table = bench.rows("cpu", 1e10, 1e12, bench.Sizes(images=3, height=40, width=50, size=24, repeats=2))
    assert all(set(row) == KEYS for row in table)
    assert all(row["correct"] for row in table if row["provider"] != "kornia")
    goals = {row["must"] for row in table if row["provider"] == "l2r2"}
    assert goals == {1.0, 40, 1 / 3, 2, 3, 5}
    assert {"torchvision_eager", "roi_align", "kornia", "batched", "torch_antialias"} <= {row["provider"] for row in table}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_the_driver_says_so_and_writes_nothing():
    results = SPEED.parent / "results"
    before = sorted(results.glob("*")) if results.exists() else []
    run = subprocess.run([sys.executable, str(SPEED / "kernels.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stdout.count("\n") == 1 and "unmeasured" in run.stdout
    assert (sorted(results.glob("*")) if results.exists() else []) == before

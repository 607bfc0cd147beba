"""The speed table: a dry run of its rows on small images, and the message of the driver without a GPU."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SPEED = Path(__file__).parents[3] / "benchmarks" / "speed"
KEYS = {
    "op", "case", "provider", "ms_median", "ms_p20", "ms_p80", "bytes", "flops", "pct_copy", "pct_matmul", "ratio", "must",
    "stretch", "correct",
}  # fmt: skip


def test_every_row_is_right_and_has_its_goal(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    import roi_views_bench as bench

    table = bench.rows("cpu", 1e10, 1e12, bench.TINY)
    assert all(set(row) == KEYS for row in table)
    assert all(row["correct"] for row in table if row["provider"] != "kornia")
    goals = {row["must"] for row in table if row["provider"] == "l2r2"}
    assert goals == {1.0, 40, 2, 2.2, 3, 5}
    ours = [(row["op"], row["case"]) for row in table if row["provider"] == "l2r2"]
    assert len(set(ours)) == len(ours)
    assert {"torchvision_eager", "roi_align", "kornia", "batched", "torch_antialias"} <= {row["provider"] for row in table}


def rows_of(case, goal, **milliseconds):
    for provider, ms in milliseconds.items():
        own = provider == "l2r2"
        row = dict.fromkeys(KEYS) | {"op": case.split()[0], "case": case, "provider": provider, "correct": True, "ms_median": ms}
        yield row | {"must": goal if own else None, "ratio": 2.5 if own else 1.5}


def load_driver():
    # Under another name: a module called `kernels` would make transformers believe that Hugging Face's own one is there.
    spec = importlib.util.spec_from_file_location("speed_table", SPEED / "kernels.py")
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver


def test_the_report_has_a_row_a_goal_with_the_peers_as_columns(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(SPEED))
    driver = load_driver()
    table = [*rows_of("roi_views a", 2.0, l2r2=1.0, torchvision=1.5), *rows_of("pack b", 3.0, l2r2=1.0, sdpa=None)]
    about = {"gpu": "Some GPU", "date": "2000-01-01"}
    rates = {"copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e15}
    assert driver.report(table, about, rates, tmp_path) == 0
    with open(tmp_path / "kernels_some-gpu_2000-01-01.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["case"], first["ms_median"], first["torchvision ms"], first["sdpa ms"]) == ("roi_views a", "1.0", "1.5", "")
    assert (second["ratio"], second["must"], second["gpu"]) == ("2.5", "3.0", "Some GPU")
    assert Image.open(tmp_path / "kernels_some-gpu_2000-01-01.png").size[0] > 1000
    table[0]["correct"] = False
    capsys.readouterr()
    assert driver.report(table, about, rates, tmp_path) == 1
    assert capsys.readouterr().out == "Wrong results, so nothing was timed: roi_views, roi_views a\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_dry_run_prints_every_row_and_keeps_no_files(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SPEED))
    before = sorted((SPEED.parent / "results").glob("*"))
    assert load_driver().main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dry run on a CPU" in lines[0] and lines[-1].startswith("Dry run: the files were deleted")
    ops = {"roi_views", "varlen_attention", "masked_attention", "run_packed", "PackedRunner"}
    assert ops <= {line.split()[0] for line in lines}
    assert sorted((SPEED.parent / "results").glob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_the_driver_says_so_and_writes_nothing():
    results = SPEED.parent / "results"
    before = sorted(results.glob("*")) if results.exists() else []
    run = subprocess.run([sys.executable, str(SPEED / "kernels.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stdout.count("\n") == 1 and "nothing was measured" in run.stdout
    assert (sorted(results.glob("*")) if results.exists() else []) == before

"""The speed table: a dry run of its rows on small images, and the message of the driver without a GPU."""

import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SPEED = Path(__file__).parents[3] / "benchmarks" / "speed"
KEYS = {
    "op", "case", "provider", "ms_median", "ms_p20", "ms_p80", "bytes", "flops", "pct_copy", "pct_matmul", "ratio", "must",
    "stretch", "correct", "note",
}  # fmt: skip


def test_every_row_is_right_and_has_its_goal(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))
    import roi_views_bench as bench

    table = list(bench.rows("cpu", 1e10, 1e12, bench.TINY))
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
        row = dict.fromkeys(KEYS) | {"op": case.split()[0], "case": case, "provider": provider, "correct": True}
        row |= {"ms_median": ms, "note": ""}
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
    shown = capsys.readouterr().out
    assert re.search(r"roi_views a +1\.000 +2\.50x +2\.00x +-  held\n", shown)
    assert re.search(r"pack b +1\.000 +2\.50x +3\.00x +-  missed\n", shown)
    table[0] |= {"correct": False, "ms_median": None, "note": "wrong result"}
    assert driver.report(table, about, rates, tmp_path) == 1, "the other rows are written all the same"
    shown = capsys.readouterr().out
    assert shown.endswith("Wrong or failed, so not timed: roi_views, roi_views a\n") and "-  wrong result\n" in shown
    with open(tmp_path / "kernels_some-gpu_2000-01-01.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["ms_median"], first["note"], second["ms_median"]) == ("", "wrong result", "1.0")


def test_a_benchmark_that_ends_early_leaves_the_rows_of_the_others(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SPEED))
    import finetune_bench
    import masked_attention_bench
    import roi_views_bench

    def ends(*_, **__):
        yield from rows_of("roi_views a", 2.0, l2r2=1.0)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(roi_views_bench, "rows", ends)
    monkeypatch.setattr(masked_attention_bench, "rows", lambda *_, **__: rows_of("pack b", 3.0, l2r2=1.0))
    monkeypatch.setattr(finetune_bench, "rows", lambda *_, **__: iter(()))
    table, _, _ = load_driver().measure(torch.device("cpu"), True)
    assert [row["case"] for row in table] == ["roi_views a", "rows after this", "pack b"]
    assert "out of memory" in capsys.readouterr().err and not table[1]["correct"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_dry_run_prints_every_row_and_keeps_no_files(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SPEED))
    before = sorted((SPEED.parent / "results").glob("*"))
    assert load_driver().main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dry run on a CPU" in lines[0] and lines[-1].startswith("Dry run: the files were deleted")
    ops = {"roi_views", "varlen_attention", "masked_attention", "run_packed", "PackedRunner", "finetune"}
    assert ops <= {line.split()[0] for line in lines if line}
    assert sorted((SPEED.parent / "results").glob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_the_driver_says_so_and_writes_nothing():
    results = SPEED.parent / "results"
    before = sorted(results.glob("*")) if results.exists() else []
    run = subprocess.run([sys.executable, str(SPEED / "kernels.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stdout.count("\n") == 1 and "nothing was measured" in run.stdout
    assert (sorted(results.glob("*")) if results.exists() else []) == before

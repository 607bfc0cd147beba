"""`l2r2 benchmark --sizes`: accuracies are those of a run with these sizes; the rule of the choice. Times are not tested."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import sentence, write_run

from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.fuse import Column, fuse
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.evaluate.sizes import _sizings, compare_sizes


def test_every_combination_has_the_accuracy_of_a_run_with_these_sizes(dataset, tmp_path):
    run = write_run(tmp_path / "run", fusion="average", branches=("full", "fg", "bg"))
    found = compare_sizes(run, dataset, [24, 32], repeats=1)
    assert found.images == 12 and found.current.sizes == {"full": 32, "fg": 32, "bg": 32}
    assert {tuple(row.sizes.values()) for row in found.rows} == {(a, b, b) for a in (24, 32) for b in (24, 32)}
    table = read_table(dataset).of_split("val")
    for row in found.rows:
        checkpoint = load_checkpoint(run)
        checkpoint.model.view_spec = replace(checkpoint.model.view_spec, sizes=row.sizes)
        save_checkpoint(checkpoint.model, tmp_path / "other", checkpoint.labels)
        logits = branch_logits(load_checkpoint(tmp_path / "other"), table)
        right = fuse(checkpoint.model.fusion, logits).argmax(-1) == logits.labels
        assert row.accuracy == pytest.approx(float(right.double().mean())) and row.seconds > 0
    assert [row.seconds for row in found.rows] == sorted(row.seconds for row in found.rows)


def test_the_fastest_within_one_standard_error_of_the_best_is_chosen():
    best, close, far = (torch.tensor([1.0] * right + [0.0] * (100 - right)) for right in (90, 88, 80))
    close[-1] = 1.0  # wrong on two images that the best has right, right on one that it has wrong
    columns = [Column(float(right.mean()), 0.0, 0.0, right) for right in (best, close, far)]
    compared = [{"full": side} for side in (64, 48, 32)]
    rows = _sizings(compared, columns, {("full", 64): 3.0, ("full", 48): 2.0, ("full", 32): 1.0})
    assert [(row.sizes["full"], row.is_equal) for row in rows] == [(32, False), (48, True), (64, True)]
    assert rows[0].behind == pytest.approx(0.1) and rows[0].error == pytest.approx((0.1 * 0.9 / 100) ** 0.5)


def test_the_command_and_what_it_refuses(dataset, tmp_path, l2r2):
    run = write_run(tmp_path / "run")
    command = ("benchmark", run, dataset, "--sizes", "24", "--repeats", 1)
    done = l2r2(*command)
    assert done.returncode == 0 and "chosen" in done.stdout and "now" in done.stdout and "12 images" in done.stdout
    found = json.loads(l2r2(*command, "--json", "--split", "test").stdout)
    assert len(found["rows"]) == 4 and found["chosen"] in found["rows"] and found["warnings"] == []
    assert l2r2("benchmark", run, "--sizes", "24").returncode == 2  # photos without labels say nothing about accuracy
    assert l2r2("benchmark", run, dataset, "--sizes", "small").returncode == 2
    assert "between 1 and" in sentence(l2r2("benchmark", run, dataset, "--sizes", "0"))
    checkpoint = load_checkpoint(run)
    checkpoint.model.view_spec = replace(checkpoint.model.view_spec, fg_mode="late")
    save_checkpoint(checkpoint.model, run, checkpoint.labels)
    assert "inside the network" in sentence(l2r2(*command))

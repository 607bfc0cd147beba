"""torchrun: two processes give the result of one, only one of them writes and prints, and an error is reported once."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

COMMAND = ["-m", "l2r2_models", "finetune"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)


@pytest.mark.timeout(600)
def test_two_processes_give_the_result_of_one(dataset, tmp_path):
    """A backbone without batch norm and a plain SGD step: the same sums in another order, so equal up to rounding. A row without
    a box and a last batch that cannot be halved are in it, so that each process has other counts than the whole batch."""
    lines = (dataset / "metadata.csv").read_text().splitlines()
    lines[1:3] = [",".join(line.split(",")[:3]) + ",,,," for line in lines[1:3]]
    (dataset / "metadata.csv").write_text("\n".join(lines[:12] + lines[13:]))  # 11 rows of train
    settings = dict(optimizer="sgd", lr=0.05, balanced=True, ema=0.5, best_metric="fused_accuracy")
    settings.update(epochs=3, batch_size=6, size=32, precision="fp32")
    finetune(dataset, Recipe.default("timm:test_vit", False, **settings), tmp_path / "one")
    options = ["--model", "timm:test_vit", "--no-pretrained", *(f"--set={key}={value}" for key, value in settings.items())]
    two = start(*TWO, *COMMAND, dataset, *options, "--json", "-o", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-5, atol=1e-6), name
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert [r["processes"] for r in records] == [1, 2]
    assert records[0]["metrics"] == records[1]["metrics"] and records[0]["best"] == records[1]["best"]
    assert json.loads(two.stdout)["metrics"] == records[1]["metrics"], "one process speaks"
    assert records[0]["recipe"] == records[1]["recipe"]


@pytest.mark.timeout(600)
def test_group_dro_is_refused_under_several_processes(dataset, tmp_path):
    """Each process would weigh the groups of its share of a batch only."""
    options = ["--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--set=objective=group_dro", "--set=group=split"]
    two = start(*TWO, *COMMAND, dataset, *options, "-o", tmp_path / "run")
    assert (
        two.returncode != 0
        and two.stderr.count("group_dro weighs the groups of a whole batch, so it needs a single process") == 1
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_an_error_is_one_sentence_however_many_processes_meet_it(dataset, tmp_path):
    (dataset / "images" / "train_003.png").write_bytes(b"broken")
    broken = start(*TWO, *COMMAND, dataset, "--model", "timm:resnet10t", "--no-pretrained", "-o", tmp_path / "run")
    assert broken.returncode != 0 and broken.stderr.count("error: 1 of 24 images cannot be used") == 1
    assert not (tmp_path / "run").exists()

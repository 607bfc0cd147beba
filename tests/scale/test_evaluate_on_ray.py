"""`l2r2 evaluate --engine ray`: the logits, and so all metrics, of one process."""

import json

import pytest
import torch
from conftest import write_dataset, write_run
from interruptions import killing

from l2r2_models import L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.scale import logits_on_ray

ray = pytest.importorskip("ray")
pytest_plugins = ["ray_clusters"]


@pytest.mark.timeout(600)
def test_metrics_and_store_are_those_of_one_process(l2r2, one_node, tmp_path, monkeypatch):
    monkeypatch.setattr("l2r2_models.scale.evaluate.BATCHES", 1)  # several pieces of work, the last one incomplete
    data, runs = write_dataset(tmp_path / "data", count=50, splits=("val", "test")), []
    for name in ("one", "ray"):
        runs.append(write_run(tmp_path / name))
    (data / "images" / "test_040.png").write_bytes(b"text")
    command = [data, "--skip-bad", "--fit-split", "val", "--json"]
    wanted = l2r2("evaluate", runs[0], *command)
    found = l2r2("evaluate", runs[1], *command, "--engine", "ray", "--workers", 1)
    assert found.returncode == wanted.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {**json.loads(wanted.stdout), "left_out": json.loads(found.stdout)["left_out"]}
    assert len(json.loads(found.stdout)["left_out"]) == 1
    stores = [{file.name: file.read_bytes() for file in (folder / "logits").iterdir()} for folder in runs]
    assert stores[0] == stores[1] and len(stores[0]) == 2
    ray.shutdown()  # the logits are stored, so no engine is needed, nor for other commands
    monkeypatch.setattr("l2r2_models.scale.engine.import_ray", None)
    assert l2r2("evaluate", runs[1], *command, "--engine", "ray").stdout == found.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_changes_no_logit(two_nodes, run, tmp_path):
    cluster, nodes = two_nodes
    checkpoint, table = load_checkpoint(run), read_table(write_dataset(tmp_path / "data", count=100))
    kill, done = killing(cluster, nodes[0], after=4)
    found = branch_logits(checkpoint, table, batch_size=1, progress=kill, compute=logits_on_ray())
    assert sum(node["Alive"] for node in ray.nodes()) == 2 and len(done) == 13
    wanted = branch_logits(checkpoint, table, batch_size=1, workers=0)
    assert all(torch.equal(found.logits[branch], wanted.logits[branch]) for branch in wanted.logits)
    assert torch.equal(found.labels, wanted.labels) and found.table == wanted.table


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_damaged_image_stops_with_its_sentence(one_node, run, dataset):
    (dataset / "images" / "train_003.png").write_bytes(b"text")
    with pytest.raises(L2R2Error, match=r"train_003\.png: is not an image.*--skip-bad"):
        branch_logits(load_checkpoint(run), read_table(dataset), compute=logits_on_ray(actors=1))

"""`l2r2 audit --engine ray`: the numbers of one process."""

import json

import pytest
from audit_cases import write_data
from conftest import write_run
from interruptions import killing

from l2r2_models.audit.audit import run_audit
from l2r2_models.scale import answers_on_ray

ray = pytest.importorskip("ray")
pytest_plugins = ["ray_clusters"]


@pytest.mark.timeout(600)
def test_an_audit_has_the_numbers_of_one_process_and_continues(l2r2, one_node, tmp_path, monkeypatch):
    monkeypatch.setattr("l2r2_models.scale.audit.IMAGES", 5)  # several pieces of work, the last one incomplete
    data, run = write_data(tmp_path / "data", 12), write_run(tmp_path / "run")
    command = ["audit", run, data, "--challenge", "--group", "site", "--json", "--work"]
    wanted, found = l2r2(*command, tmp_path / "one"), l2r2(*command, tmp_path / "ray", "--engine", "ray", "--workers", 1)
    assert found.returncode == wanted.returncode == 0, found.stderr
    assert json.loads(found.stdout) == json.loads(wanted.stdout)
    stores = [[file.read_bytes() for file in (tmp_path / name).iterdir()] for name in ("one", "ray")]
    assert stores[0] == stores[1]
    ray.shutdown()  # the predictions are stored, so no engine is needed
    monkeypatch.setattr("l2r2_models.scale.engine.import_ray", None)
    assert l2r2(*command, tmp_path / "ray", "--engine", "ray").stdout == found.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_changes_no_prediction(two_nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("l2r2_models.scale.audit.IMAGES", 2)
    cluster, nodes = two_nodes
    data, run = write_data(tmp_path / "data", 24, masks=True), write_run(tmp_path / "run")
    kill, done = killing(cluster, nodes[0], after=4)

    def progress(items, total, what):
        return kill(items, total) if what == "changing images" else items

    found = run_audit(run, data, work=tmp_path / "ray", progress=progress, compute=answers_on_ray())
    assert sum(node["Alive"] for node in ray.nodes()) == 2 and len(done) >= 24
    wanted = run_audit(run, data, work=tmp_path / "one", workers=0)
    assert found.result == wanted.result
    assert found.answers.values.nan_to_num(-1).equal(wanted.answers.values.nan_to_num(-1))

"""The engine itself: the rows of one process, on one node and on two of which one is killed."""

import os
import shutil

import pytest
from conftest import sentence, write_dataset, write_run
from pyarrow import parquet

from l2r2_models import L2R2Error, Predictor
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.scale import predict, read_table

ray = pytest.importorskip("ray")
STORE = 80_000_000  # bytes of the object store per node, the smallest that Ray takes
# Ray lets its workers yield to every other process; on a busy machine they would hardly start
os.environ.setdefault("RAY_worker_niceness", "0")


def one_process(run, sources, out, adapt="off", **options):
    options = {"device": "cpu", "workers": 0, **options}
    report = predict_to_file(Predictor.from_pretrained(run, **options), gather(sources), out, adapt=adapt)
    return parquet.read_table(out).to_pylist(), report


@pytest.fixture
def one_node():
    ray.init("local", num_cpus=1, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def two_nodes():
    """A head without cores, and two nodes of one core; yields the cluster and the nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_the_folder_grows_with_its_input_and_holds_the_rows_of_one_process(l2r2, one_node, run, dataset, tmp_path):
    out, images = tmp_path / "out", sorted((dataset / "images").iterdir())
    command = ["predict", run, dataset / "images", "--boxes", dataset / "metadata.csv", "-o", out, "--engine", "ray"]
    (tmp_path / "later").mkdir()
    late = shutil.move(images[20], tmp_path / "later" / images[20].name)
    (dataset / "images" / "bad.jpg").write_bytes(b"text")
    assert (result := l2r2(*command)).returncode == 1 and "1 failed" in result.stdout and "bad.jpg" in result.stderr
    first = set(out.iterdir())
    shutil.move(late, images[20])
    (dataset / "images" / "bad.jpg").unlink()
    result = l2r2(*command)
    assert result.returncode == 0 and "36 images" in result.stdout and "Traceback" not in result.stderr
    assert len({f for f in out.iterdir() if f.suffix == ".parquet"} - first) == 1
    predict_to_file(
        Predictor.from_pretrained(run, device="cpu"),
        gather([dataset / "images"], dataset / "metadata.csv"),
        tmp_path / "a.parquet",
    )
    assert read_table(out).to_pylist() == parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert parquet.read_table(out).num_rows == 36  # a folder of Parquet for every other reader
    ray.shutdown()  # nothing is left to do, and so no engine is needed
    assert "1 partition, 1 of them from before" in l2r2(*command).stdout
    other = write_run(tmp_path / "other", seed=1)
    assert "different model_sha256" in sentence(l2r2("predict", other, *command[2:]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_costs_nothing_but_time(two_nodes, run, tmp_path):
    cluster, nodes = two_nodes
    data = write_dataset(tmp_path / "data", count=100, splits=("train", "val"))
    done = []

    def kill(results, total):
        for result in results:
            done.append(result[0])
            if len(done) == 4:
                cluster.remove_node(nodes[0], allow_graceful=False)
            yield result

    assert sum(node["Alive"] for node in ray.nodes()) == 3
    report = predict([data], run, tmp_path / "out", partition_size=8, progress=kill, workers=0, batch_size=8)
    assert sum(node["Alive"] for node in ray.nodes()) == 2 and len(done) == report.partitions > 10
    assert read_table(tmp_path / "out").to_pylist() == one_process(run, [data], tmp_path / "one.parquet", batch_size=8)[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_command_continues_with_a_localizer_and_decoders_of_their_own(two_nodes, run, tmp_path):
    data = write_dataset(tmp_path / "data", count=60, splits=("train",))
    options = {"localizer": "center", "workers": 0}

    def interrupted(results, total):
        yield next(iter(results))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict([data], run, tmp_path / "out", partition_size=8, progress=interrupted, **options)
    with pytest.raises(L2R2Error, match="is not complete; run the same command again"):
        read_table(tmp_path / "out")
    report = predict([data], run, tmp_path / "out", partition_size=8, decode_apart=True, actors=1, **options)
    assert 1 <= report.kept < report.partitions
    inputs = gather([data]).without_boxes()
    predict_to_file(Predictor.from_pretrained(run, device="cpu", **options), inputs, tmp_path / "one.parquet")
    assert read_table(tmp_path / "out").to_pylist() == parquet.read_table(tmp_path / "one.parquet").to_pylist()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("adapt", ["folder", "group:site"])
def test_groups_are_fused_as_on_one_machine(one_node, tmp_path, adapt):
    data, run = write_dataset(tmp_path / "data", splits=("train", "val", "test")), write_run(tmp_path / "run")
    lines = (data / "metadata.csv").read_text().splitlines()
    sites = [lines[0] + ",site", *(f"{line},{'AB'[i % 2]}" for i, line in enumerate(lines[1:]))]
    (data / "metadata.csv").write_text("\n".join(sites))
    fit_run(run, data, "val")
    report = predict([data], run, tmp_path / "out", partition_size=8, adapt=adapt, workers=0)
    rows, one = one_process(run, [data], tmp_path / "one.parquet", adapt)
    found = sorted(read_table(tmp_path / "out").to_pylist(), key=lambda row: row["file"])
    assert found == sorted(rows, key=lambda row: row["file"]) and report.shares == one.shares
    again = predict([data], run, tmp_path / "out", partition_size=8, adapt=adapt, workers=0)
    assert again.kept == again.partitions and again.shares == one.shares

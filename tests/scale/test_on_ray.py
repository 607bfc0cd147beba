"""The engine itself: the rows of one process, on one node and on two of which one is killed."""

import re
import shutil

import pytest
from conftest import sentence, write_dataset, write_run
from interruptions import interrupted, killing
from pyarrow import parquet

from l2r2_models import L2R2Error, Predictor
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.scale import predict, read_table

ray = pytest.importorskip("ray")
pytest_plugins = ["ray_clusters"]


def one_process(run, sources, out, adapt="off", **options):
    options = {"device": "cpu", "workers": 0, **options}
    report = predict_to_file(Predictor.from_pretrained(run, **options), gather(sources), out, adapt=adapt)
    return parquet.read_table(out).to_pylist(), report


@pytest.mark.timeout(600)
def test_the_folder_holds_the_rows_of_one_process(l2r2, one_node, run, dataset, tmp_path):
    out = tmp_path / "out"
    (dataset / "images" / "bad.jpg").write_bytes(b"text")
    sources = ["--boxes", dataset / "metadata.csv", dataset / "images"]
    command = ["predict", run, *sources, "-o", out, "--engine", "ray"]
    result = l2r2(*command)
    assert result.returncode == 1 and "37 images" in result.stdout and "1 failed" in result.stdout and "bad.jpg" in result.stderr
    l2r2("predict", run, *sources, "-o", tmp_path / "one.parquet")
    assert read_table(out).to_pylist() == parquet.read_table(tmp_path / "one.parquet").to_pylist()
    assert parquet.read_table(out).num_rows == 37  # a folder of Parquet for every other reader
    ray.shutdown()  # nothing is left to do, so no engine is needed
    again = l2r2(*command).stdout
    assert re.search(r"in (\d+) partitions?, \1 of them from before", again), again
    other = write_run(tmp_path / "other", seed=1)
    assert "different model_sha256" in sentence(l2r2("predict", other, *command[2:]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_growing_input_changes_only_the_partition_that_grows(one_node, run, tmp_path):
    data = write_dataset(tmp_path / "data", count=60, splits=("train",)) / "images"
    images = sorted(data.iterdir())
    late = shutil.move(images[20], tmp_path / images[20].name)
    first = predict([data], run, tmp_path / "out", partition_size=8, workers=0)
    shutil.move(late, images[20])
    (data / images[5].name).write_bytes(images[6].read_bytes())  # another photo of the same name
    report = predict([data], run, tmp_path / "out", partition_size=8, workers=0)
    assert first.kept == 0 and report.partitions - report.kept in (2, 3) and report.partitions > 4
    assert read_table(tmp_path / "out").to_pylist() == one_process(run, [data], tmp_path / "one.parquet")[0]
    assert parquet.read_table(tmp_path / "out").num_rows == 60  # the earlier partitions of these images are gone
    (tmp_path / "more").mkdir()
    shutil.copy(images[0], tmp_path / "more" / "z.png")
    predict([tmp_path / "more"], run, tmp_path / "out", partition_size=8, workers=0)
    assert read_table(tmp_path / "out")["file"].to_pylist()[0].endswith("z.png")
    assert read_table(tmp_path / "out").num_rows == 61  # and those of other images stay


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_costs_nothing_but_time(two_nodes, run, tmp_path):
    cluster, nodes = two_nodes
    data = write_dataset(tmp_path / "data", count=100, splits=("train", "val"))
    kill, done = killing(cluster, nodes[0], after=4)
    assert sum(node["Alive"] for node in ray.nodes()) == 3
    report = predict([data], run, tmp_path / "out", partition_size=8, progress=kill, workers=0, batch_size=8)
    assert sum(node["Alive"] for node in ray.nodes()) == 2 and len(done) == report.partitions > 10
    assert read_table(tmp_path / "out").to_pylist() == one_process(run, [data], tmp_path / "one.parquet", batch_size=8)[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_command_continues_with_a_localizer_and_decoders_of_their_own(two_nodes, run, tmp_path):
    data = write_dataset(tmp_path / "data", count=60, splits=("train",))
    options = {"localizer": "center", "workers": 0}
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
def test_a_run_that_changes_after_the_start_is_one_sentence(one_node, dataset, tmp_path):
    from l2r2_models.predict.rules import Rules

    run = write_run(tmp_path / "run")

    def change(predictor):  # after the run was loaded here, and before the workers load it
        write_run(run, seed=1)
        return Rules(predictor.labels)

    with pytest.raises(L2R2Error, match="another checkpoint than at the start of this command"):
        predict([dataset], run, tmp_path / "out", rules=change)


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

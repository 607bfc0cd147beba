"""`l2r2 localize --engine ray`: the box file of one process, as a folder."""

import os
import pickle
import re
import tarfile

import pyarrow as pa
import pytest
from bad_images import write_bad_images
from conftest import sentence, write_dataset, write_run
from interruptions import interrupted, killing
from pyarrow import parquet

from l2r2_models import L2R2Error
from l2r2_models.boxes import read_boxes
from l2r2_models.localize import create_localizer
from l2r2_models.localize.localize_files import localize_to_file
from l2r2_models.predict.inputs import gather
from l2r2_models.scale import localize, read_table
from l2r2_models.scale.localize import Localize, LocalizePlan
from l2r2_models.scale.output import Output
from l2r2_models.scale.results import Assembly, Rows, Tally
from l2r2_models.scale.sources import find

ray = pytest.importorskip("ray")
pytest_plugins = ["ray_clusters"]


def one_process(spec, sources, out, **options):
    localize_to_file(create_localizer(spec, device="cpu"), gather(sources).paths, out, workers=0, **options)
    return parquet.read_table(out)


def rows_of(sources, spec):
    """Rows of all images in one partition, by the stage that a worker runs."""
    finder, assembly = create_localizer(spec, device="cpu"), Assembly(Rows.of_boxes({}, {}))
    (part,) = find(sources, given=False).partitions(finder, size=10**9)
    stage = Localize(LocalizePlan(finder.spec, finder.info, 8, ""))
    for row in stage({"key": [part.key], "data": [pickle.dumps(part)]}):
        rows = assembly.add(part.key, row["slice"][0], pickle.loads(row["data"][0]) if row["data"][0] else None)
    return rows


def test_forty_bad_images_are_rows_with_their_failure(dataset, tmp_path):
    bad = write_bad_images(tmp_path / "bad")
    sources = [dataset, tmp_path / "bad", *bad]
    rows = rows_of(sources, "outlier")
    assert rows.tally.images == 36 + len(bad) and rows.tally.failed == len(bad) >= 40 and rows.tally.retry == 0
    assert rows.table.to_pylist() == one_process("outlier", sources, tmp_path / "one.parquet").to_pylist()


def test_an_image_whose_name_is_not_utf8_is_a_row_with_its_failure(dataset, tmp_path):
    plain = rows_of([dataset], "outlier").table.to_pylist()
    odd = dataset / "images" / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes((dataset / "images" / "train_000.png").read_bytes())
    rows = rows_of([dataset, odd], "outlier")
    assert rows.table.to_pylist()[:-1] == plain and (rows.tally.failed, rows.tally.retry) == (1, 0)
    (failed,) = rows.table.to_pylist()[len(plain) :]
    assert failed["file"] == str(odd).replace("\udce9", r"\udce9") and failed["boxes"] == []
    assert rows.tally.reasons == (f"{failed['file']}: the file name is not UTF-8, as a Parquet file needs; rename the image.",)


def test_images_in_shards_have_boxes_under_their_names(dataset, tmp_path):
    paths = gather([dataset]).paths[:3]
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    parquet.write_table(pa.table({"image": images}), tmp_path / "s.parquet")
    found = rows_of([tmp_path / "s.parquet"], "outlier").table.to_pylist()
    plain = one_process("outlier", paths, tmp_path / "one.parquet").to_pylist()
    assert [row["file"] for row in found] == [f"{tmp_path}/s.parquet/{path.name}" for path in paths]
    assert [row["boxes"] for row in found] == [row["boxes"] for row in plain] and found[0]["stamp"] is None


def test_a_failure_of_the_localizer_is_tried_again_and_a_damaged_image_is_not(dataset, tmp_path, monkeypatch):
    from l2r2_models.localize.outlier import Outlier

    def fails(self, images, names, prompts):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Outlier, "find", fails)
    rows = rows_of([dataset / "images"], "outlier")
    assert rows.tally.retry == rows.tally.failed == 36 and Tally.parse(rows.tally.dumps()) == rows.tally


@pytest.mark.timeout(600)
def test_the_folder_is_the_box_file_of_one_process(l2r2, one_node, run, dataset, tmp_path):
    out = tmp_path / "boxes"
    (dataset / "images" / "bad.jpg").write_bytes(b"text")
    command = ["localize", dataset / "images", "--localizer", "outlier", "-o", out, "--engine", "ray"]
    result = l2r2(*command)
    assert result.returncode == 1 and re.search("37 images in .* without; 1 failed", result.stdout), result.stderr
    assert "bad.jpg" in result.stderr
    one = one_process("outlier", [dataset / "images"], tmp_path / "one.parquet")
    assert read_table(out).to_pylist() == one.to_pylist() and read_table(out).schema == one.schema.remove_metadata()
    table, file = read_boxes(out), read_boxes(tmp_path / "one.parquet")
    assert (table.entries, table.info, table.stamps) == (file.entries, file.info, file.stamps)
    ray.shutdown()  # nothing is left to do, so no engine is needed
    again = l2r2(*command).stdout
    assert re.search(r"in (\d+) partitions?, \1 of them from before", again), again
    assert "different localizer" in sentence(l2r2(*command[:3], "center", *command[4:]))
    outputs = []
    for boxes in (out, tmp_path / "one.parquet"):
        outputs.append(tmp_path / f"{boxes.name}.csv")
        l2r2("predict", run, dataset / "images", "--boxes", boxes, "-o", outputs[-1])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with pytest.raises(L2R2Error, match="is not a box file"):
        predicted = tmp_path / "predictions.parquet"
        l2r2("predict", run, dataset / "images", "-o", predicted)
        read_boxes(predicted)


def test_a_folder_that_is_not_complete_is_no_box_file(tmp_path):
    output = Output(tmp_path / "boxes", create_localizer("center", device="cpu").info)
    output.start()
    with pytest.raises(L2R2Error, match="boxes: is not complete; run the same command again"):
        read_boxes(tmp_path / "boxes")
    output.finish([])
    assert read_boxes(tmp_path / "boxes").entries == {}
    for text in ("{", '{"header": null, "complete": true, "partitions": []}'):
        (tmp_path / "boxes" / "_manifest.json").write_text(text)
        with pytest.raises(L2R2Error, match=r"_manifest\.json: is damaged; remove the folder"):
            read_boxes(tmp_path / "boxes")
    (tmp_path / "boxes" / "_manifest.json").write_text('{"header": {}, "complete": true, "partitions": ["a.parquet"]}')
    with pytest.raises(L2R2Error, match=r"a\.parquet: is missing; run the same command again"):
        read_boxes(tmp_path / "boxes")


def test_a_folder_of_boxes_is_joined_to_shards(dataset, tmp_path):
    image = next((dataset / "images").glob("*.png"))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(image, "a.png")
    output = Output(tmp_path / "boxes", create_localizer("center", device="cpu").info)
    output.start()
    output.finish([])
    found = find([str(tmp_path / "s.tar")], tmp_path / "boxes")
    assert found.boxes is not None and found.boxes.entries == {}


def test_what_one_machine_alone_can_do_is_refused(l2r2, dataset, tmp_path):
    command = ["localize", dataset, "--localizer", "center", "-o", tmp_path / "boxes", "--engine", "ray"]
    for more in (["--oracle-prompts"], ["--format", "coco"], ["--device", "cpu"]):
        result = l2r2(*command, *more)
        assert result.returncode == 2 and "without --oracle-prompts, --device and --format" in result.stderr
    assert "must be at least 1" in sentence(l2r2(*command, "--workers", 0))
    assert not (tmp_path / "boxes").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_and_an_interruption_cost_nothing_but_time(two_nodes, tmp_path):
    cluster, nodes = two_nodes
    data = write_dataset(tmp_path / "data", count=100, splits=("train", "val"))
    run = write_run(tmp_path / "run", box_head=True)
    arguments = [[data], f"head:{run}", tmp_path / "out"]
    with pytest.raises(KeyboardInterrupt):
        localize(*arguments, partition_size=8, progress=interrupted)
    with pytest.raises(L2R2Error, match="is not complete; run the same command again"):
        read_boxes(tmp_path / "out")
    kill, done = killing(cluster, nodes[0], after=4)
    report = localize(*arguments, partition_size=8, progress=kill)
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    assert report.kept >= 1 and len(done) == report.partitions - report.kept > 8
    assert read_table(tmp_path / "out").to_pylist() == one_process(f"head:{run}", [data], tmp_path / "one.parquet").to_pylist()


def test_a_worker_refuses_other_weights_than_the_command_began_with(tmp_path):
    run = write_run(tmp_path / "run", box_head=True)
    finder = create_localizer(f"head:{run}", device="cpu")
    plan = LocalizePlan(finder.spec, finder.info, 8, "")
    assert plan.localizer().info == finder.info
    write_run(run, seed=1, box_head=True)
    with pytest.raises(L2R2Error, match="other weights than at the start of this command"):
        plan.localizer()

"""What the workers of the engine do, without the engine: the rows are those of one process."""

import io
import pickle
import tarfile

import pyarrow as pa
import pytest
from bad_images import write_bad_images
from conftest import write_run
from pyarrow import parquet

from l2r2_models import L2R2Error, Predictor
from l2r2_models.fusion import Grouping
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.scale.partitions import chunks
from l2r2_models.scale.places import Place, url_of
from l2r2_models.scale.results import Assembly, Rows, Tally
from l2r2_models.scale.shards import images_of_shard
from l2r2_models.scale.sources import find
from l2r2_models.scale.stages import Classify, Decode, Plan, Predict


def plan_of(run, **options):
    predictor = Predictor.from_pretrained(run, device="cpu")
    return Plan(str(run), predictor.checkpoint.digest, {"workers": 0, **options}, predictor.rules)


def work_of(part):
    return {"key": [part.key], "data": [pickle.dumps(part)]}


def assembled(batches):
    """Rows by partition, from batches in the worst order."""
    assembly, found = Assembly(), {}
    for batch in reversed(list(batches)):
        for key, number, data in zip(batch["key"], batch["slice"], batch["data"]):
            if (rows := assembly.add(key, number, pickle.loads(data) if data else None)) is not None:
                found[key] = rows
    return found


def rows_of_one_process(run, inputs, out, **options):
    predict_to_file(Predictor.from_pretrained(run, device="cpu", workers=0, **options), inputs, out)
    return parquet.read_table(out).to_pylist()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("localizer", [None, "center"])
def test_forty_bad_images_in_a_partition_are_rows_with_their_failure(run, dataset, tmp_path, apart, localizer):
    bad = write_bad_images(tmp_path / "bad")
    sources, options = [dataset, tmp_path / "bad", *bad], {} if localizer is None else {"localizer": localizer}
    found = find(sources, given=localizer is None)
    predictor = Predictor.from_pretrained(run, device="cpu", **options)
    (part,) = found.partitions(predictor.localizer, size=10**9)
    plan = plan_of(run, **options)
    if apart:
        classify = Classify(plan)
        batches = [rows for slice in Decode(plan)(work_of(part)) for rows in classify(slice)]
    else:
        batches = Predict(plan)(work_of(part))
    (rows,) = assembled(batches).values()
    inputs = gather(sources) if localizer is None else gather(sources).without_boxes()
    assert len(bad) >= 40 and rows.tally.failed == len(bad) and rows.tally.images == 36 + len(bad)
    assert rows.table.to_pylist() == rows_of_one_process(run, inputs, tmp_path / "one.parquet", **options)


def test_cutting_does_not_depend_on_where_the_list_begins_or_grows():
    names = [f"site{i % 7}/{i:05}.jpg" for i in range(3000)]
    before = list(chunks(names, str, 50))
    grown = list(chunks([*names[:1000], "site3/new.jpg", *names[1000:]], str, 50))
    assert [name for part in before for name in part] == names and max(map(len, before)) <= 200
    assert sum(part not in before for part in grown) <= 2


def test_a_slice_that_arrives_twice_counts_once():
    assembly, rows = Assembly(), Rows.of([{"file": "a.jpg", "failure": "a.jpg: no such file."}])
    assert assembly.add("k", 0, rows) is None and assembly.add("k", 0, rows) is None
    assert assembly.add("k", 1, None).tally == Tally(1, failed=1, reasons=("a.jpg: no such file.",))
    assert assembly.add("empty", 0, None).table.num_rows == 0


def test_failures_that_may_pass_are_told_from_those_of_the_file():
    whole = [{"fg": {}, "reason": "the localizer failed (out of memory); classified"}]
    failures = ["a.jpg: cannot be read (Permission denied).", "b.jpg: is empty (0 bytes)."]
    tally = Tally.of([*({"file": "x", "failure": why} for why in failures), {"file": "c", "objects": whole}])
    assert (tally.retry, tally.failed, tally.unlocalized) == (2, 2, 1) and Tally.parse(tally.dumps()) == tally


def shard(path, images):
    with tarfile.open(path, "w") as archive:
        for name, data in images:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))


def test_shards_give_the_predictions_of_their_images(run, dataset, tmp_path):
    paths = gather([dataset], split="train").paths
    images = [(f"cam/{path.name}", path.read_bytes()) for path in paths]
    shard(tmp_path / "a.tar", [images[0], ("cam/notes.txt", b"x"), ("cam/bad.jpg", b"text"), *images[1:]])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:9000])
    columns = {"image": [{"bytes": data, "path": name} for name, data in images] + [{"bytes": None, "path": "none.jpg"}]}
    parquet.write_table(pa.table(columns), tmp_path / "b.parquet")
    found = find([tmp_path / "*.tar", tmp_path / "b.parquet"])
    predict, given = Predict(plan_of(run)), gather([dataset], split="train").without_boxes()
    one = [{k: v for k, v in row.items() if k != "file"} for row in rows_of_one_process(run, given, tmp_path / "one.parquet")]
    rows = [next(iter(assembled(predict(work_of(part))).values())) for part in found.partitions(predict.predictor.localizer)]
    plain = [[{k: v for k, v in row.items() if k != "file"} for row in r.table.to_pylist() if not row["failure"]] for r in rows]
    assert plain[0] == one and plain[2] == one and 0 < len(plain[1]) < 12
    assert rows[0].table["file"].to_pylist()[:2] == [f"{tmp_path}/a.tar/cam/{paths[0].name}", f"{tmp_path}/a.tar/cam/bad.jpg"]
    assert "the shard is damaged or truncated" in rows[1].tally.reasons[-1]
    assert rows[2].tally.reasons == (f"{tmp_path}/b.parquet/none.jpg: has no image in this row.",)


@pytest.mark.parametrize("left", [1536, 1600, 2 * 1536])
def test_a_tar_that_ends_between_two_images_is_damaged(tmp_path, left):
    shard(tmp_path / "a.tar", [("0.jpg", bytes(700)), ("1.jpg", bytes(700)), ("2.jpg", bytes(700))])
    assert len(list(images_of_shard("a.tar", Place.of(tmp_path / "a.tar")))) == 3
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:left])
    *images, (name, why) = images_of_shard("a.tar", Place.of(tmp_path / "a.tar"))
    assert [one for one, _ in images] == [f"a.tar/{i}.jpg" for i in range(left // 1536)]
    assert name == "a.tar" and "cannot be read further (there is no end of the archive)" in why


def test_parquet_without_images_is_refused_before_the_work(tmp_path):
    parquet.write_table(pa.table({"label": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(L2R2Error, match=r"b\.parquet: has no column of encoded images"):
        find([tmp_path / "b.parquet"])


def test_urls_are_listed_read_and_joined_to_boxes(run, dataset, tmp_path):
    url = f"file://{dataset}/images"
    boxes = tmp_path / "boxes.json"
    boxes.write_text('{"images/train_000.png": [[1, 2, 30, 30]]}')
    (dataset / "images" / "bad.jpg").write_bytes(b"text")
    (dataset / "images" / ".hidden.jpg").write_bytes(b"text")
    found = find([url], boxes)
    assert len(found.places) == len(find([url, f"{url}/train_000.png"], boxes).places) == 37  # overlapping: each image once
    with pytest.raises(L2R2Error, match="adapted by folder, or group:COLUMN"):
        found.groups(Grouping.parse("sequence:60"))
    predict = Predict(plan_of(run))
    (part,) = found.partitions(predict.predictor.localizer, size=10**9)
    (rows,) = assembled(predict(work_of(part))).values()
    one = rows_of_one_process(run, gather([dataset / "images"], boxes), tmp_path / "one.parquet")
    for row in one:
        row["file"] = f"file://{row['file']}"
        row["failure"] = row["failure"] and f"file://{row['failure']}"
    assert rows.table.to_pylist() == one and rows.tally.found == 1
    with pytest.raises(L2R2Error, match="no image and no shard at this place"):
        find([f"file://{tmp_path}/nothing"])


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(L2R2Error, match="contains credentials") as error:
        Place.of("s3://key:secret@bucket/photos")
    assert "secret" not in str(error.value)
    with pytest.raises(L2R2Error, match="no place that pyarrow can open"):
        Place.of("nonsense://bucket/photos")
    assert url_of("photos/a.jpg") is None and url_of("hf:org/name") is None


def test_a_worker_refuses_another_checkpoint_than_the_command_began_with(run, tmp_path):
    plan = plan_of(run)
    with pytest.raises(L2R2Error, match="another checkpoint than at the start"):
        Plan(str(write_run(tmp_path / "other", seed=1)), plan.digest, {}, plan.rules).predictor()

"""Training, evaluation and prediction from shards: the results are those of the same images in a folder."""

import itertools
import json

import pytest
from conftest import sentence, write_dataset
from huggingface_hub import constants
from pyarrow import parquet
from shard_cases import in_parquet, in_tars, members_of, metadata_of, write_tar
from test_reading_per_process import PROGRAM, rows_of, train_with_two
from test_resume import same_weights, train_and_kill

from l2r2_models import L2R2Error
from l2r2_models.boxes import read_boxes
from l2r2_models.data.table import read_table
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # of other processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("folder") / "data", count=15, splits=("train", "val"))


SETTINGS = Recipe.default(
    "timm:resnet10t",
    False,
    **{"size": 32, "epochs": 4, "batch_size": 6, "balanced": True, "ema": 0.9, "background_swap": 0.5, "workers": 2},
)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run from the folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finetune(data, SETTINGS, folder)


def test_killed_and_continued_from_tars_the_run_is_that_from_a_folder(data, whole, tmp_path):
    packed, out = in_tars(data, tmp_path / "packed"), tmp_path / "killed"
    train_and_kill(packed, SETTINGS, out)
    before = (shard := packed / "train-00002.tar").read_bytes()
    write_tar(shard, [*members_of(data, metadata_of(data)["train"][10:]), ("new.png", b"x"), ("new.cls", b"red")])
    with pytest.raises(L2R2Error, match="contains a run with a different data set") as error:
        finetune(packed, SETTINGS, out)
    assert "\n" not in str(error.value)
    shard.write_bytes(before)
    result = finetune(packed, SETTINGS, out)
    assert same_weights(whole[0], out) and result.metrics == whole[1].metrics and result.with_box == whole[1].with_box == 15
    assert json.loads((out / "run.json").read_text())["train_files"][-1] == "train-00002.tar/images/train_014.png"


def test_the_run_from_parquet_is_that_from_a_folder(data, whole, tmp_path):
    result = finetune(in_parquet(data, tmp_path / "packed"), SETTINGS, tmp_path / "run")
    assert same_weights(whole[0], tmp_path / "run") and result.metrics == whole[1].metrics


def test_a_damaged_image_is_named_with_its_shard_and_can_be_skipped(l2r2, data, tmp_path):
    rows = metadata_of(data)
    for split in rows:
        write_tar(tmp_path / "d" / f"{split}-0.tar", members_of(data, rows[split]))
    write_tar(tmp_path / "d" / "train-1.tar", [("cam/bad.jpg", b"\xff\xd8\xff cut"), ("cam/bad.cls", b"red")])
    options = ["--model", "timm:resnet10t", "--no-pretrained", "--epochs", "1", "--set", "size=32", "-o", tmp_path / "run"]
    assert f"1 of 31 images cannot be used, e.g. {tmp_path}/d/train-1.tar/cam/bad.jpg: " in sentence(
        l2r2("finetune", tmp_path / "d", *options)
    )
    result = l2r2("finetune", tmp_path / "d", *options, "--skip-bad")
    assert result.returncode == 0, result.stderr


def test_parquet_without_labels_is_one_sentence(l2r2, data, tmp_path):
    packed = in_parquet(data, tmp_path / "packed")
    for file in packed.rglob("*.parquet"):
        parquet.write_table(parquet.read_table(file).drop_columns("label"), file)
    options = ["--model", "timm:resnet10t", "--no-pretrained", "-o", tmp_path / "run"]
    message = sentence(l2r2("finetune", packed, *options))
    assert "15 of 15 images have no label, the first is data/train-00000-of-00001.parquet/images/train_000.png" in message


def test_every_command_reads_the_same_shards(l2r2, run, data, tmp_path):
    """localize -> evaluate with these boxes -> fuse -> predict, on shards and on the folder."""

    def call(*arguments):
        result = l2r2(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    packed, found = in_tars(data, tmp_path / "packed"), {}
    for name, source in (("folder", data), ("shards", packed)):
        boxes, own = tmp_path / f"{name}.json", tmp_path / name
        call("localize", source, "--localizer", "center", "-o", boxes)
        own.mkdir()
        for file in ("config.json", "model.safetensors"):
            (own / file).write_bytes((run / file).read_bytes())
        evaluated = json.loads(call("evaluate", own, source, "--boxes", boxes, "--split", "val", "--json"))
        call("fuse", own, source, "--boxes", boxes, "--split", "val")
        call("predict", own, source, "--boxes", boxes, "-o", tmp_path / f"{name}_p.json")
        predicted = json.loads((tmp_path / f"{name}_p.json").read_text())["images"]
        found[name] = evaluated["rows"], sorted((one["file"].split("/")[-1], one["objects"]) for one in predicted)
    assert found["folder"] == found["shards"]
    assert f"{packed}/train-00001.tar/images/train_005.png" in read_boxes(tmp_path / "shards.json").entries
    assert (
        json.loads((tmp_path / "shards_p.json").read_text())["images"][0]["file"]
        == f"{packed}/train-00000.tar/images/train_000.png"
    )


@pytest.mark.timeout(600)
def test_each_process_opens_the_shards_of_its_own_rows_only(tmp_path):
    """Each image is in a shard of its own, so that an opened shard is an image that is read."""
    packed = in_tars(write_dataset(tmp_path / "data", splits=("train", "val")), tmp_path / "packed", size=1)
    train_with_two(tmp_path, packed, PROGRAM.replace('".png"', '".tar"'))
    table = read_table(packed)
    train, val = table.of_split("train"), [row.path.parents[1].name for row in table.of_split("val").rows]
    shards = {row.path.name: row.path.parents[1].name for row in train.rows}
    opened = [name for name, _ in itertools.groupby((tmp_path / "opened" / "1").read_text().split())]
    own = [name for start in range(2, len(val), 4) for name in val[start : start + 2]]
    drawn = [[shards[name] for name in rows_of(train, 1, epoch)] for epoch in (0, 1)]
    assert opened == [*drawn[0], *own, *drawn[1], *own, *own], "it indexes no shard, and opens those of its own rows"

"""Prediction files: every format, an archive that grows and changes, kills, damage, and non-finite outputs."""

import csv
import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from conftest import sentence, write_run
from PIL import Image

from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.images import list_images
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file

FORMATS = ["json", "jsonl", "csv", "parquet"]


@pytest.fixture
def predictor(run):
    return Predictor.from_pretrained(run, device="cpu")


@pytest.fixture
def looked_at(predictor, monkeypatch):
    """The names of the images that the predictor was asked for."""
    seen, original = [], predictor.predict_files
    monkeypatch.setattr(predictor, "predict_files", lambda paths, *rest: original(seen.extend(map(str, paths)) or paths, *rest))
    return seen


def rows_of(out):
    if out.suffix == ".csv":
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(out.read_text().splitlines())]
    from pyarrow import parquet

    return [{k: v for k, v in row.items() if v is not None} for row in parquet.read_table(out).to_pylist()]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_contents_and_is_continued(predictor, dataset, tmp_path, looked_at, name):
    inputs, out = gather([dataset], split="train"), tmp_path / f"out.{name}"
    bad = inputs.paths[3]
    good = bad.read_bytes()
    bad.write_text("not an image")
    report = predict_to_file(predictor, inputs, out)
    assert report.total == 12 and [f["file"] for f in report.failures] == [str(bad)] and sum(report.sources.values()) == 11
    images = report.images
    assert [image["file"] for image in images] == [str(path) for path in inputs.paths]
    if name in ("csv", "parquet"):
        rows = rows_of(out)
        assert [row["file"] for row in rows] == [str(path) for path in inputs.paths]
        for row, image in zip(rows, images):
            if "failure" in image:
                assert row == {"file": str(bad), "failure": image["failure"]}
            else:
                (o,) = image["objects"]
                assert [float(row[k]) for k in ("x0", "y0", "x1", "y1")] == list(o["box"]) and float(row["score"]) == o["score"]
                assert (row["label"], row["source"], row["reason"]) == (o["label"], o["source"], o["reason"])
    elif name == "jsonl":
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line.get("objects") for line in lines] == [image.get("objects") for image in images]
    else:
        assert json.loads(out.read_text())["images"] == images
    looked_at.clear()
    bad.write_bytes(good)
    assert predict_to_file(predictor, inputs, out).kept == 11 and looked_at == [str(bad)]
    looked_at.clear()
    assert predict_to_file(predictor, inputs, out).kept == 12 and looked_at == []


def test_only_what_changed_in_a_growing_archive_is_done_again(predictor, tmp_path, dataset, looked_at):
    boxes, out, folder = tmp_path / "boxes.json", tmp_path / "out.json", dataset / "images"
    paths = list_images([folder])
    given = {path.name: [[1, 2, 30, 40]] for path in paths}
    boxes.write_text(json.dumps(given))
    predict_to_file(predictor, gather([folder], boxes), out)
    Image.new("RGB", (60, 40), (9, 200, 9)).save(folder / "zz.png")  # one more photo and its box
    Image.new("RGB", (60, 40), (9, 9, 200)).save(paths[7])  # another photo of the same name
    boxes.write_text(json.dumps({**given, "zz.png": [[3, 3, 9, 9]], paths[4].name: [[1, 2, 30, 39]]}))
    looked_at.clear()
    report = predict_to_file(predictor, gather([folder], boxes), out)
    assert looked_at == [str(paths[4]), str(paths[7]), str(folder / "zz.png")] and report.kept == 34
    predict_to_file(predictor, gather([folder], boxes), tmp_path / "fresh.json")
    assert out.read_bytes() == (tmp_path / "fresh.json").read_bytes()


def test_a_changed_mask_is_predicted_again(predictor, dataset, tmp_path, looked_at):
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 40, 30))
    mask.save(dataset / "mask.png")
    rows = "file_name,label,mask_file\nimages/train_000.png,red,mask.png\nimages/train_001.png,red,\n"
    (dataset / "metadata.csv").write_text(rows)
    predict_to_file(predictor, gather([dataset]), tmp_path / "out.json")
    mask.paste(255, (0, 0, 9, 9))
    mask.save(dataset / "mask.png")
    looked_at.clear()
    predict_to_file(predictor, gather([dataset]), tmp_path / "out.json")
    assert looked_at == [str(dataset / "images" / "train_000.png")]


def test_one_photo_by_two_paths_is_one_image(predictor, dataset, tmp_path, monkeypatch, looked_at):
    monkeypatch.chdir(dataset)
    both = gather([dataset / "images" / "test_000.png", *list_images(["images"])])
    assert len(both.paths) == 36
    predict_to_file(predictor, gather(list_images(["images"])), tmp_path / "out.json")
    looked_at.clear()
    report = predict_to_file(predictor, gather([dataset / "images"]), tmp_path / "out.json")
    assert report.kept == 36 and looked_at == []
    absolute = [str(path) for path in list_images([dataset / "images"])]
    assert [image["file"] for image in json.loads((tmp_path / "out.json").read_text())["images"]] == absolute


def test_earlier_predictions_for_other_images_stay(predictor, dataset, tmp_path):
    out = tmp_path / "out.json"
    predict_to_file(predictor, gather([dataset], split="val"), out)
    report = predict_to_file(predictor, gather([dataset], split="test"), out)
    names = [image["file"] for image in json.loads(out.read_text())["images"]]
    assert [image["file"] for image in report.images] == names[:12] and "test_000" in names[0] and "val_000" in names[12]


def test_killed_at_a_random_moment_the_same_command_gives_the_same_file(run, dataset, tmp_path):
    out, parts, wanted = tmp_path / "killed.json", tmp_path / "killed.json.parts", random.randrange(1, 34)
    command = [sys.executable, "-m", "l2r2_models", "predict", run, dataset, "--batch-size", "1", "-o", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and sum(len(part.read_bytes().splitlines()) for part in parts.glob("part-*")) <= wanted:
        time.sleep(0.001)
    process.kill()
    process.wait()
    if out.exists():
        pytest.skip(f"the process was through before it was seen to have {wanted} images")  # fast machines only
    (part,) = parts.glob("part-*")
    part.write_bytes(part.read_bytes() + b'{"file": "half')  # as a kill in the middle of a line leaves it
    inputs = gather([dataset])
    one_by_one = Predictor.from_pretrained(run, device="cpu", batch_size=1)
    assert predict_to_file(one_by_one, inputs, out).kept >= wanted
    predict_to_file(one_by_one, inputs, tmp_path / "whole.json")
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [file for file in tmp_path.iterdir() if file.name.startswith(("killed", ".killed"))] == [out]


def test_killed_after_the_file_was_written_and_before_its_journal_is_gone(predictor, dataset, tmp_path, monkeypatch, looked_at):
    monkeypatch.setattr("l2r2_models.journal.Journal.remove", lambda self: None)
    inputs, out = gather([dataset], split="train"), tmp_path / "out.json"
    predict_to_file(predictor, inputs, out)
    whole = out.read_bytes()
    monkeypatch.undo()
    assert predict_to_file(predictor, inputs, out).kept == 12 and out.read_bytes() == whole
    assert not (tmp_path / "out.json.parts").exists()


HEADER = '{"format_version": "1.0", "model_sha256": "x", "images": [\n'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "", "was not written by `l2r2 predict`"),
        (lambda text: "[1, 2]\n", "was not written by `l2r2 predict`"),
        (lambda text: "\x00" * 100, "was not written by `l2r2 predict`"),
        (lambda text: "[" * 100_000, "was not written by `l2r2 predict`"),
        (lambda text: json.dumps(json.loads(text), indent=1), "was not written by `l2r2 predict`"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: text.replace('"file"', '"fil"', 1), "is damaged (line 2)"),
        (lambda text: text.replace('"reason"', '"raison"', 1), "is damaged (line 2)"),
        (lambda text: text.replace('"objects": [', '"objects": 3, "x": [', 1), "is damaged (line 2)"),
        (lambda text: text.split("\n")[0] + '\n{"file": ["a"], "failure": "b"}\n]}\n', "is damaged (line 2)"),
        (lambda text: text.split("\n")[0] + "\n" + "[" * 100_000 + "\n]}\n", "is damaged (line 2)"),
        (lambda text: HEADER + "]}\n", "was made with a different"),
    ],
)
def test_a_damaged_file_of_predictions_is_a_sentence(predictor, dataset, tmp_path, change, said):
    inputs, out = gather([dataset], split="train"), tmp_path / "out.json"
    predict_to_file(predictor, inputs, out)
    out.write_text(change(out.read_text()))
    with pytest.raises(L2R2Error) as error:
        predict_to_file(predictor, inputs, out)
    assert str(error.value).startswith(str(out)) and said in str(error.value) and "choose another -o" in str(error.value)


def test_a_damaged_line_of_the_journal_is_done_again(predictor, dataset, tmp_path, looked_at):
    inputs, out = gather([dataset], split="train"), tmp_path / "out.csv"
    predict_to_file(predictor, inputs, out)
    (part,) = (tmp_path / "out.csv.parts").glob("part-*")
    lines = part.read_bytes().split(b"\n")
    lines[2], lines[5], lines[6] = b"\x00" * 50, lines[5][:70], b'{"file": 7}'
    part.write_bytes(b"\n".join(lines))
    looked_at.clear()
    assert predict_to_file(predictor, inputs, out).kept == 9
    assert looked_at == [str(inputs.paths[i]) for i in (1, 4, 5)] and len(rows_of(out)) == 12


def test_a_file_without_its_journal_or_of_another_kind_is_refused(l2r2, run, dataset, tmp_path):
    (tmp_path / "out.csv").write_text("file,label\n")
    assert "cannot be continued without" in sentence(l2r2("predict", run, dataset, "-o", tmp_path / "out.csv"))
    assert "must end in .json, .jsonl, .csv, .parquet" in sentence(l2r2("predict", run, dataset, "-o", tmp_path / "out.txt"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_that_is_not_utf8_can_be_written(predictor, dataset, tmp_path, name):
    odd = dataset / "images" / os.fsdecode(b"caf\xe9.png")
    (dataset / "images" / "train_000.png").rename(odd)
    inputs, out = gather([dataset / "images"]), tmp_path / f"out.{name}"
    predict_to_file(predictor, inputs, out)
    assert predict_to_file(predictor, inputs, out).kept == 36
    if name == "json":
        assert str(odd) in [image["file"] for image in json.loads(out.read_text())["images"]]
    elif name != "jsonl":
        assert sum("caf\\udce9.png" in row["file"] for row in rows_of(out)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("branch", ["full", "fg"])
def test_an_output_that_is_not_finite_is_the_failure_of_its_image(l2r2, dataset, tmp_path, value, branch):
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run"))
    predictor, paths = Predictor(checkpoint, device="cpu"), gather([dataset], split="train").paths
    original, seen = predictor.model.fuse, []

    def broken(logits, *rest):  # the third image of the first batch
        seen.append(1)
        logits[branch][2] = value
        return original(logits, *rest)

    predictor.model.fuse = broken
    report = predict_to_file(predictor, gather([dataset], split="train"), tmp_path / "out.json")
    (failure,) = report.failures
    assert failure["file"] == str(paths[2]) and f"the model's output is not finite ({branch}" in failure["failure"]
    assert len(json.loads((tmp_path / "out.json").read_text())["images"]) == 12


def test_a_network_that_gives_nan_ends_with_status_1_and_names_the_images(l2r2, dataset, tmp_path):
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run"))
    torch.nn.init.constant_(next(p for n, p in checkpoint.model.named_parameters() if "bias" in n), float("nan"))
    hub.save_checkpoint(checkpoint.model, tmp_path / "nan", checkpoint.labels)
    result = l2r2("predict", tmp_path / "nan", dataset, "--split", "test", "-o", tmp_path / "out.json")
    assert result.returncode == 1 and "12 failed" in result.stdout
    assert "test_000.png: the model's output is not finite" in result.stderr

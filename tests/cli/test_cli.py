"""The commands as a new user meets them: their output, and that invalid input never ends in a traceback."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib

import pytest
from conftest import sentence, write_run

from l2r2_models.runs import read_evaluations


def bomb(path):
    """A PNG of a few bytes that claims 20000 x 10000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


def test_list_shows_models_tags_parameters_and_input_sizes(l2r2):
    result = l2r2("list")
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("l2r2_convnextv2_base ")]
    assert line.split()[1:4] == ["fcmae_ft_in22k_in1k", "89.7", "224"]
    rows = json.loads(l2r2("list", "l2r2_vit_tiny*", "--pretrained", "--json").stdout)
    assert {r["model"] for r in rows} == {"l2r2_vit_tiny_patch16_224"} and len(rows) > 1
    assert "No model matches" in sentence(l2r2("list", "nonsense"))
    free = json.loads(l2r2("list", "*convnext*", "--license", "Apache-2.0", "--license", "mit", "--json").stdout)
    assert {r["license"] for r in free} == {"apache-2.0"} and not any("convnextv2" in r["model"] for r in free)
    assert "licenses are: cc-by-nc-4.0" in sentence(l2r2("list", "*convnextv2*", "--license", "mit"))


def test_predict_writes_predictions_with_reasons(l2r2, run, dataset, tmp_path):
    result = l2r2("predict", run, dataset, "--split", "test", "-o", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    assert "12 images: 12 predictions, 12 with an object found, 0 from the whole image; 0 failed" in result.stdout
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert images[0]["objects"][0]["reason"] and images[0]["objects"][0]["fg"]["label"]
    again = l2r2("predict", run, dataset, "--split", "test", "-o", tmp_path / "out.json")
    assert "12 images, 12 of them from before" in again.stdout


def test_predict_keeps_going_over_bad_files_and_exits_1(l2r2, run, dataset, tmp_path):
    bomb(dataset / "images" / "train_000.png")
    (dataset / "images" / "train_001.png").write_bytes(b"PK\x03\x04")
    (dataset / "images" / "train_002.png").write_bytes(b"")
    result = l2r2("predict", run, dataset / "images", "-o", tmp_path / "out.json")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "more pixels than the limit of 100,000,000" in result.stderr
    assert "is a ZIP archive" in result.stderr and "is empty" in result.stderr
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert len(images) == 36 and sum("failure" in i for i in images) == 3


def test_predict_refuses_what_it_cannot_use(l2r2, run, dataset, tmp_path):
    out = ["-o", tmp_path / "out.json"]
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in sentence(l2r2("predict", run, tmp_path / "empty", *out))
    assert "no such file or folder" in sentence(l2r2("predict", run, tmp_path / "nowhere", *out))
    assert "neither a run nor a checkpoint" in sentence(l2r2("predict", dataset, dataset, *out))
    assert "hf download nobody/nothing" in sentence(l2r2("predict", "nobody/nothing", dataset, *out))
    (tmp_path / "boxes.json").write_text('{"elsewhere.jpg": [[1, 2, 30, 40]]}')
    assert "none of its 1 entries" in sentence(l2r2("predict", run, dataset, "--boxes", tmp_path / "boxes.json", *out))
    (tmp_path / "boxes.json").write_text("{")
    assert "boxes.json: is not readable JSON" in sentence(l2r2("predict", run, dataset, "--boxes", tmp_path / "boxes.json", *out))
    (tmp_path / "out.json").mkdir()
    assert "out.json" in sentence(l2r2("predict", run, dataset, *out))


def test_finetune_refuses_what_it_cannot_use(l2r2, dataset, tmp_path):
    base = ["--no-pretrained", "--size", "32", "--epochs", "1", "-o", tmp_path / "run"]
    tiny = ["--model", "timm:resnet10t", *base]
    assert 'Unknown model "l2r2_resnat"' in sentence(l2r2("finetune", dataset, "--model", "l2r2_resnat", *base))
    assert 'Unknown fusion "rubust"; choose from' in sentence(l2r2("finetune", dataset, *tiny, "--set", "fusion=rubust"))
    assert "no such folder" in sentence(l2r2("finetune", tmp_path / "nowhere", *tiny))
    text = (dataset / "metadata.csv").read_text()
    (dataset / "metadata.csv").write_text(text.replace("train_004.png,green", "train_004.png,"))
    assert "1 of 12 images have no label, the first is images/train_004.png" in sentence(l2r2("finetune", dataset, *tiny))
    assert not (tmp_path / "run").exists()


def test_misuse_exits_2_and_shows_the_usage(l2r2, tmp_path):
    top = ["predict", "a", "b", "-o", "c", "--top", "0"]
    for arguments in (["predict"], ["finetune", tmp_path], ["nonsense"], ["list", "--nonsense"], top):
        result = l2r2(*arguments)
        assert result.returncode == 2 and "Usage" in result.stderr and "Traceback" not in result.stderr


def test_the_installed_command_ends_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", "from l2r2_cli.commands import main; main()", "predict", tmp_path, "x.jpg", "-o", "out.json"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "no such file or folder" in sentence(result)


def test_finetune_then_predict_as_the_readme_does(l2r2, dataset, tmp_path):
    boxes = {f"{s}_{i:03d}.png": [[1, 1, 30, 30]] for s in ("train", "val", "test") for i in range(12)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    result = l2r2(
        "finetune",
        dataset,
        "--model",
        "timm:resnet10t",
        "--no-pretrained",
        "--size",
        32,
        "--epochs",
        1,
        "--boxes",
        tmp_path / "boxes.json",
        "-o",
        tmp_path / "run",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)  # nothing but the answer
    assert (answer["images"], answer["with_box"], answer["left_out"]) == (12, 12, 0)
    assert answer["run"] == str(tmp_path / "run") and "fg_accuracy" in answer["metrics"]
    files = ["--boxes", tmp_path / "boxes.json", "-o", tmp_path / "out.json"]
    result = l2r2("predict", tmp_path / "run", dataset / "images", *files)
    assert result.returncode == 0 and "36 with an object found" in result.stdout


@pytest.mark.parametrize("option", ["plain", "three"])
def test_every_kind_of_run_can_predict(l2r2, tmp_path, dataset, option):
    run = write_run(tmp_path / "run", branches=("full",) if option == "plain" else ("full", "fg", "bg"))
    assert l2r2("predict", run, dataset, "--split", "val", "-o", tmp_path / "out.json").returncode == 0


def test_fuse_and_evaluate_print_tables_or_json(l2r2, tmp_path, dataset):
    run = write_run(tmp_path / "run")
    result = l2r2("fuse", run, dataset, "--split", "val", "--method", "robust")
    assert result.returncode == 0 and "<- chosen" in result.stdout and f"saved into {run}" in result.stdout
    assert (
        json.loads(l2r2("fuse", run, dataset, "--dry-run", "--json").stdout)["rows"] == 12 + 3 * 12
    )  # as they are, and each object on three other backgrounds
    chosen = l2r2("fuse", run, dataset, "--dry-run").stdout  # no fusion of a network with random weights is better than fg
    assert re.search(r"\n  fg  .*<- chosen\n", chosen) and "--cascade 0" in chosen
    result = l2r2("evaluate", run, dataset, "--group", "label", "--fit-split", "val")
    assert result.returncode == 0 and "worst label" in result.stdout and "scaled_average" in result.stdout
    assert "accuracy by label" in result.stdout and "12 of the 12 images of val" not in result.stderr
    assert json.loads(l2r2("evaluate", run, dataset, "--json").stdout)["images"] == 12
    assert "no image has the split" in sentence(l2r2("evaluate", run, dataset, "--split", "nowhere"))
    both = ("evaluate", run, dataset, "--split", "test", "--split", "val")
    out = l2r2(*both, "--report", tmp_path / "both.html").stdout
    assert "test, in %" in out and "val, in %" in out and "From test to val, the accuracy changes by" in out
    (tmp_path / "both.json").write_text(l2r2(*both, "--json").stdout)
    assert [e["split"] for e in read_evaluations(run, [tmp_path / "both.json"])] == ["test", "val", "test", "val"]
    assert 'Unknown fusion "rubust"' in sentence(l2r2("fuse", run, dataset, "--method", "rubust"))

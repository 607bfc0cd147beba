"""Damaged and odd files, command by command: one sentence that names the file, exit status 1, and nothing lost."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from l2r2_cli.commands import app, main
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.errors import L2R2Error
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.io import file_sha256, read_json, write_json
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

LONG = "n" * 300


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from conftest import write_dataset

    data = write_dataset(tmp_path_factory.mktemp("data") / "data", splits=("train", "val", "test"))
    recipe = Recipe.read("scratch", {"model": "timm:resnet10t", "size": 32, "epochs": 1})
    return finetune(data, recipe, tmp_path_factory.mktemp("run") / "run", val_split="val").folder, data


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run"), trained[1]


def said(capsys, monkeypatch, *command):
    """The one sentence with which a command ends, as the program prints it."""
    import sys

    monkeypatch.setattr(sys, "argv", ["l2r2", *map(str, command)])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and error[-1].startswith("error: "), error
    return error[-1]


DAMAGE = {
    "not JSON": "{",
    "a list": "[]",
    "a number": "3",
    "other types": '{"recipe": 3, "data": [], "metrics": "none", "train_files": {}, "val_files": [3]}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["finetune", "evaluate", "fuse", "publish"])
def test_a_damaged_record_of_a_run(command, damage, run, capsys, monkeypatch):
    folder, data = run
    (folder / "run.json").write_text(DAMAGE[damage])
    arguments = {
        "finetune": ["finetune", data, "--model", "timm:resnet10t", "--no-pretrained", "-o", folder],
        "evaluate": ["evaluate", folder, data, "--split", "test"],
        "fuse": ["fuse", folder, data],
        "publish": ["publish", folder, "org/name", "--license", "mit"],
    }
    sentence = said(capsys, monkeypatch, *arguments[command])
    assert "run.json" in sentence or "is not a run" in sentence


FIELDS = {"recipe": [3, "x", []], "metrics": [3, [], {"fg_accuracy": "x"}, {"fg_accuracy": None}], "notes": [3, [3], {}]}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_field_of_another_type_in_the_record_of_a_run(field, value, run, capsys, monkeypatch):
    folder, data = run
    (folder / "run.json").write_text(json.dumps({**read_json(folder / "run.json"), field: value}))
    assert "run.json" in said(capsys, monkeypatch, "publish", folder, "org/name", "--license", "mit")
    settings = ["--set", "size=32", "--epochs", "1", "--val-split", "val"]
    assert "run.json" in said(
        capsys, monkeypatch, "finetune", data, "--model", "timm:resnet10t", "--no-pretrained", "-o", folder, *settings
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_evaluation_of_a_run(damage, run, capsys, monkeypatch):
    folder, _ = run
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "data.test.json").write_text(DAMAGE[damage])
    assert "data.test.json" in said(capsys, monkeypatch, "publish", folder, "org/name", "--license", "mit")


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "RUN", LONG + ".jpg", "-o", "OUT"],
        ["predict", LONG, "DATA", "-o", "OUT"],
        ["predict", "RUN", "DATA", "-o", LONG + ".json"],
        ["evaluate", LONG, "DATA"],
        ["localize", LONG, "--localizer", "center", "-o", "OUT"],
        ["finetune", LONG, "--model", "timm:resnet10t", "-o", "OUT"],
        ["finetune", "DATA", "--model", "timm:resnet10t", "--no-pretrained", "-o", LONG],
        ["fuse", LONG, "DATA"],
    ],
    ids=" ".join,
)
def test_names_that_no_file_can_have(command, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run[0], "DATA": run[1], "OUT": tmp_path / "out.json"}
    assert LONG[:50] in said(capsys, monkeypatch, *(places.get(word, word) for word in command))


def test_a_view_of_a_million_pixels_and_an_unknown_argument_are_no_checkpoint(run, capsys, monkeypatch, tmp_path):
    folder, data = run
    config = read_json(folder / "config.json")
    config["model_args"]["views"]["size"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    assert "between 1 and 4096" in said(capsys, monkeypatch, "predict", folder, data, "-o", tmp_path / "o.json")


def test_what_a_killed_process_left_of_a_new_run_is_no_run(run, tmp_path):
    out = tmp_path / "new"
    out.mkdir()
    (out / ".run.json.abcd_123.tmp").write_text("{")
    recipe = Recipe.read("scratch", {"model": "timm:resnet10t", "size": 32, "epochs": 1})
    finetune(run[1], recipe, out)
    assert not list(out.glob(".run.json*"))


def test_a_run_knows_its_weights(run, tmp_path, caplog):
    folder, data = run
    assert read_json(folder / "run.json")["weights_sha256"] == file_sha256(folder / "model.safetensors")
    load_checkpoint(folder)
    assert not caplog.records
    CliRunner().invoke(app, ["fuse", str(folder), str(data), "--method", "average"], catch_exceptions=False)
    load_checkpoint(folder)  # which fuse has written anew
    assert not [r for r in caplog.records if "SHA-256" in r.message]
    recipe = Recipe.read("scratch", {"model": "timm:resnet10t", "size": 32, "epochs": 1, "seed": 5})
    other = finetune(data, recipe, tmp_path / "b")
    shutil.copy(other.folder / "model.safetensors", folder / "model.safetensors")
    load_checkpoint(folder, any_fusion=True)
    assert [r.message for r in caplog.records if "SHA-256" in r.message] == [
        f"{folder}: model.safetensors was changed after training (its SHA-256 differs from run.json)"
    ]


def test_a_read_only_run_can_be_evaluated(run):
    """As on a read-only disk: the metrics are printed, and one sentence says that they are not kept."""
    folder, data = run
    for name in ("evaluations", "logits"):
        (folder / name).write_text("a file where a folder should be")
    result = CliRunner().invoke(app, ["evaluate", str(folder), str(data), "--split", "test"])
    assert result.exit_code == 0 and "fused: robust" in result.stdout
    assert "These metrics will be missing from the model card of this run." in " ".join(result.stderr.split())


def test_weights_that_the_run_did_not_write_are_neither_fitted_nor_published(run, tmp_path, capsys, monkeypatch):
    folder, data = run
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "heads.fg.bias": weights["heads.fg.bias"] + 1}, folder / "model.safetensors", {"format": "pt"})
    before = file_sha256(folder / "model.safetensors")
    assert "the weights have changed since training" in said(capsys, monkeypatch, "fuse", folder, data, "--method", "average")
    CliRunner().invoke(app, ["evaluate", str(folder), str(data)])
    publish = ["publish", str(folder), "org/name", "--license", "mit", "--without-metrics"]
    result = CliRunner().invoke(app, publish)
    assert result.exit_code == 1 and "has been changed: its SHA-256 differs" in result.output
    assert file_sha256(folder / "model.safetensors") == before


@pytest.mark.parametrize("last", ["before the weights", "after the weights"])
def test_a_fusion_that_was_killed_while_it_was_saved_leaves_a_run_that_knows_its_weights(run, monkeypatch, caplog, last):
    folder, data = run
    written = []
    real = os.replace

    def replace(source, target):
        if Path(target).name == "model.safetensors" and last == "before the weights":
            raise KeyboardInterrupt
        real(source, target)
        written.append(Path(target).name)
        if Path(target).name == "model.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        fit_run(folder, data, "val", method="average")
    monkeypatch.undo()
    assert next(name for name in written if name in ("run.json", "model.safetensors")) == "run.json"  # before the weights
    load_checkpoint(folder, any_fusion=True)
    assert not [r for r in caplog.records if "SHA-256" in r.message]
    fit_run(folder, data, "val", method="average")
    assert read_json(folder / "run.json")["weights_sha256"] == file_sha256(folder / "model.safetensors")


def test_a_private_file_stays_private(tmp_path):
    file = tmp_path / "boxes.json"
    file.write_text("old")
    file.chmod(0o600)
    write_json(file, {})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("key, value", [("epochs", 10**24), ("workers", 300), ("batch_size", 10**12)])
def test_recipes_that_no_machine_could_run_are_refused(key, value):
    with pytest.raises(L2R2Error, match=key):
        Recipe.read("scratch", {"model": "timm:resnet10t", key: value})

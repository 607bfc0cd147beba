"""Training on a user's folder: it learns, continues after a kill, and refuses unusable data before training."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import write_dataset
from safetensors.torch import load_file

from l2r2_models import L2R2Error, Predictor
from l2r2_models.data.table import read_table
from l2r2_models.train.finetune import finetune
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe


def recipe(**changes):
    return Recipe.default("timm:resnet10t", False, **{"size": 32, "epochs": 1, "batch_size": 6, **changes})


def test_a_run_holds_a_checkpoint_that_predicts_and_how_it_was_made(dataset, tmp_path):
    result = finetune(dataset, recipe(epochs=6, lr=2e-3, label_smoothing=0.0), tmp_path / "run")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors", "recipe.yaml", "run.json"]
    assert set(result.metrics) >= {"fused_accuracy", "full_accuracy", "fg_accuracy"}
    assert result.metrics["fg_accuracy"] >= 0.9  # the square's color is the class
    record = json.loads((run / "run.json").read_text())
    assert Recipe.from_dict(record["recipe"]) == recipe(epochs=6, lr=2e-3, label_smoothing=0.0)
    assert record["versions"]["timm"] and record["metrics"] == result.metrics
    predictor = Predictor.from_pretrained(run)
    assert predictor.labels == ("blue", "green", "red")
    rows = read_table(dataset).of_split("test").rows
    answers = list(predictor.predict_files([r.path for r in rows], {str(r.path): r.entry for r in rows}))
    assert sum(a.objects[0].fg.label == r.label for a, r in zip(answers, rows)) >= 11
    assert finetune(dataset, recipe(epochs=6, lr=2e-3, label_smoothing=0.0), run).was_finished


def test_another_recipe_or_other_data_never_mix_with_a_run(dataset, tmp_path):
    run = tmp_path / "run"
    finetune(dataset, recipe(), run)
    weights = (run / "model.safetensors").read_bytes()
    with pytest.raises(L2R2Error, match="contains a run with a different epochs, seed"):
        finetune(dataset, recipe(epochs=2, seed=1), run)
    text = (dataset / "metadata.csv").read_text()
    (dataset / "metadata.csv").write_text(text.replace("images/train_000.png,red", "images/train_000.png,blue"))
    with pytest.raises(L2R2Error, match="a different data set"):
        finetune(dataset, recipe(), run)
    assert (run / "model.safetensors").read_bytes() == weights
    finetune(dataset, recipe(), run, overwrite=True)
    assert (run / "model.safetensors").read_bytes() != weights


def test_a_run_is_the_same_if_it_is_older_than_a_recipe_key_that_is_not_set(dataset, tmp_path):
    run = tmp_path / "run"
    finetune(dataset, recipe(), run)
    record = json.loads((run / "run.json").read_text())
    del record["recipe"]["cut"]
    (run / "run.json").write_text(json.dumps(record))
    assert finetune(dataset, recipe(), run).was_finished
    with pytest.raises(L2R2Error, match="a run with a different cut"):
        finetune(dataset, recipe(cut="device"), run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(dataset, tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, dataset):
        with pytest.raises(L2R2Error, match="is not a run of `l2r2 finetune`"):
            finetune(dataset, recipe(), out, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work" and (dataset / "metadata.csv").exists()


def test_overwriting_deletes_the_old_run_only_when_the_new_one_can_start(dataset, tmp_path):
    run = tmp_path / "run"
    finetune(dataset, recipe(), run)
    with pytest.raises(L2R2Error, match="Unknown timm backbone"):
        finetune(dataset, Recipe.default("timm:resnat10t", False, size=32), run, overwrite=True)
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_run_that_lost_a_file_is_not_called_finished(dataset, tmp_path, lost):
    run = tmp_path / "run"
    finetune(dataset, recipe(), run)
    (run / lost).unlink()
    assert not finetune(dataset, recipe(), run).was_finished
    Predictor.from_pretrained(run)


def test_a_last_batch_of_one_row_does_not_stop_batch_norm(tmp_path):
    data = write_dataset(tmp_path / "data", count=9)
    finetune(data, recipe(batch_size=4, branches=("full",)), tmp_path / "run")


def test_a_size_that_the_backbone_does_not_take_shows_before_training(dataset, tmp_path):
    with pytest.raises(L2R2Error, match="does not take views of 8 x 8 pixels"):
        finetune(dataset, Recipe.default("timm:efficientformer_l1", False, size=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_diverged_training_is_no_success(dataset, tmp_path):
    with pytest.raises(L2R2Error, match="has diverged"):
        finetune(dataset, recipe(lr=1e30, branches=("full",)), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("columns", [",0.1,1,1,9,9", ",0.9,500,500,600,600"])
def test_boxes_that_cannot_be_used_never_train_an_fg_branch_silently(tmp_path, columns):
    data = write_dataset(tmp_path / "data")
    lines = [",".join(line.split(",")[:3]) for line in (data / "metadata.csv").read_text().splitlines()]
    text = "\n".join([lines[0] + ",score,x0,y0,x1,y1", *(line + columns for line in lines[1:])])
    (data / "metadata.csv").write_text(text)
    with pytest.raises(L2R2Error, match="no training image has a usable box or mask"):
        finetune(data, recipe(), tmp_path / "run")


def test_a_killed_run_continues_to_the_very_same_weights(dataset, tmp_path):
    """SIGKILL after the first epoch, the same command again: bitwise equal to a run that nobody disturbed."""
    command = [
        sys.executable,
        "-c",
        "from l2r2_cli.commands import main; main()",
        "finetune",
        str(dataset),
        "--model",
        "timm:resnet10t",
        "--no-pretrained",
        "--size",
        "32",
        "--epochs",
        "4",
        "--batch-size",
        "6",
        "-o",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
    first = tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "it finished before it could be killed"
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment, capture_output=True)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)


def test_bad_images_stop_before_training_or_are_left_out_and_named(dataset, tmp_path):
    (dataset / "images" / "train_003.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(L2R2Error, match=r"1 of 24 images cannot be used, e\.g\. .*train_003\.png.*--skip-bad"):
        finetune(dataset, recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = finetune(dataset, recipe(), tmp_path / "run", skip_bad=True)
    assert [p.name for p in result.skipped] == ["train_003.png"]


def test_training_without_any_box_says_what_to_do(tmp_path):
    data = write_dataset(tmp_path / "data")
    text = "\n".join(",".join(line.split(",")[:3]) for line in (data / "metadata.csv").read_text().splitlines())
    (data / "metadata.csv").write_text(text)
    with pytest.raises(L2R2Error, match="so fg cannot be trained; pass --boxes FILE, or train a plain classifier"):
        finetune(data, recipe(), tmp_path / "run")
    assert finetune(data, recipe(branches=("full",)), tmp_path / "plain").folder.exists()


def test_rows_without_a_box_train_the_full_branch_only():
    model = create_model(recipe(), 3)
    loss = BranchLoss(model)
    views, labels = torch.randn(2, 4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    none = loss(labels, torch.zeros(4, dtype=torch.bool), full=views[0], fg=views[1])
    none["loss"].backward()
    assert model.heads["fg"].weight.grad.abs().sum() == 0 and model.heads["full"].weight.grad.abs().sum() > 0
    some = loss(labels, torch.tensor([True, False, True, False]), full=views[0], fg=views[1])
    ce = torch.nn.functional.cross_entropy
    assert torch.allclose(some["loss"], ce(some["full"], labels) + ce(some["fg"][::2], labels[::2]))
    assert torch.equal(some["fused"][1::2], some["full"][1::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "rubust"}, 'Unknown fusion "rubust"'),
        ({"fg_mode": "cropped"}, 'Unknown fg_mode "cropped"'),
        ({"branches": ("whole",)}, 'Unknown branch "whole"'),
        ({"epochs": 0}, "epochs must lie between 1 and 100,000, got 0"),
        ({"threshold": 0.5, "fusion": "average"}, 'threshold is for the fusion "robust"'),
        ({"box_jitter": 3.0}, "box_jitter must lie between 0 and 1"),
        ({"seed": -1}, "seed must lie between"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"size": 0}, "size must lie between 1 and"),
    ],
)
def test_unusable_recipes_are_sentences(dataset, tmp_path, changes, message):
    with pytest.raises(L2R2Error, match=message):
        finetune(dataset, recipe(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["resnet18", "l2r2_resnat18", "timm:resnat18", "l2r2_resnet18.no_tag", "l2r2.tag"])
def test_unknown_models_are_sentences(dataset, tmp_path, name):
    with pytest.raises(L2R2Error, match=r"Unknown|Invalid pretrained tag|has no tag"):
        finetune(dataset, Recipe.default(name, False, size=32), tmp_path / "run")


def test_weights_that_cannot_be_downloaded_say_what_to_do(dataset, tmp_path):
    with pytest.raises(L2R2Error, match="--no-pretrained"):
        finetune(dataset, Recipe.default("l2r2_resnet18", True, size=32), tmp_path / "run")  # tests are offline

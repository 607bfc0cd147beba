"""A killed training continues to bit-identical weights, with all its state."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import write_dataset
from safetensors.torch import load_file

from l2r2_models import L2R2Error
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

CASES = [
    {"ema": 0.9, "balanced": True, "objective": "group_dro", "group": "split", "group_step": 0.5},
    {"mixup": 0.8, "cutmix": 1.0, "mix_probability": 0.7, "drop": 0.2, "drop_path": 0.2},
    {"precision": "bf16", "grad_accumulation": 2, "channels_last": True},
    {"consistency": 4.0, "background_swap": 0.5},
    {"optimizer": "lookahead_lamb", "layer_decay": 0.8, "best_metric": "full_accuracy"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("resume") / "data", count=15, splits=("train", "val"))


def recipe(**changes):
    return Recipe.default("timm:resnet10t", False, **{"size": 32, "epochs": 5, "batch_size": 6, **changes})


TRAIN = """
import json, sys, torch
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe
torch.set_num_threads(1)
finetune(sys.argv[1], Recipe.from_dict(json.loads(sys.argv[2])), sys.argv[3])
"""


def train_elsewhere(data, recipe, out):
    """Start the training in a process of its own; a fork would inherit the threads of whatever ran here before."""
    command = [sys.executable, "-c", TRAIN, str(data), json.dumps(recipe.to_dict()), str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def is_json(file):
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):  # gone, or half-written
        return False


def train_and_kill(data, recipe, out):
    """Train in a process of its own; SIGKILL as soon as there is a checkpoint."""
    process = train_elsewhere(data, recipe, out)
    while not any(is_json(file) for file in (out / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "model.safetensors").exists(), "it finished before it could be killed"


def same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])], ids=lambda case: " ".join(case)
)
def test_killed_or_not_the_weights_are_the_same(data, tmp_path, case):
    whole = finetune(data, recipe(**case), tmp_path / "whole")
    train_and_kill(data, recipe(**case), tmp_path / "killed")
    result = finetune(data, recipe(**case), tmp_path / "killed")
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert result.metrics == whole.metrics
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert 1 <= record["epochs"]["before_this_call"] < 5 and record["epochs"]["trained"] == 5


@pytest.mark.slow
def test_every_setting_of_the_cases_does_something(data, tmp_path):
    """Else the test above would pass for settings that do nothing."""
    base = {"epochs": 1, "precision": "fp32", "channels_last": False}  # on some hardware, auto is what a case sets
    finetune(data, recipe(**base), tmp_path / "plain")
    without = ("mix_probability", "best_metric", "objective", "group", "group_step")  # the last three: see test_group_recipes.py
    settings = {key: value for case in CASES for key, value in case.items() if key not in without}
    for key, value in settings.items():
        finetune(data, recipe(**{**base, key: value}), tmp_path / key)
        assert not same_weights(tmp_path / "plain", tmp_path / key), key


def test_a_stop_for_lack_of_progress_survives_an_interruption(data, tmp_path):
    """Stopped between the last epoch and the end of the run, the next call trains no further epoch."""
    stops = recipe(best_metric="full_accuracy", patience=1, epochs=30, lr=1e-6, warmup=0.0)
    whole = finetune(data, stops, tmp_path / "whole")
    best = json.loads((tmp_path / "whole" / "run.json").read_text())["best"]
    assert best["epochs"] < 30 and best["epochs"] - best["epoch"] == 1
    run = tmp_path / "stopped"
    process = train_elsewhere(data, stops, run)
    while not (run / "run.json").exists():
        assert process.poll() is None, "it ended before it began"
        time.sleep(0.002)
    (run / "model.safetensors").mkdir()  # so that the weights cannot be saved at the end
    process.wait()
    (run / "model.safetensors").rmdir()
    again = finetune(data, stops, run)
    assert again.metrics == whole.metrics and same_weights(tmp_path / "whole", run)
    record = json.loads((run / "run.json").read_text())
    assert record["best"] == best and record["epochs"] == {"trained": best["epochs"], "before_this_call": best["epochs"]}


def test_only_what_does_not_change_the_result_may_change_on_the_way(data, tmp_path):
    train_and_kill(data, recipe(), tmp_path / "run")
    with pytest.raises(L2R2Error, match="contains a run with a different ema"):
        finetune(data, recipe(ema=0.9), tmp_path / "run")
    finetune(data, recipe(workers=1), tmp_path / "run")
    finetune(data, recipe(), tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")

"""Train, evaluate, publish, and load again in fresh processes by every interface: same logits, same predictions."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import write_dataset
from hub_double import TOKEN, HubDouble
from pulling import pull

from l2r2_cli.commands import main
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.models.hub_configs import load_hub_configs, parse_hub_config


@pytest.fixture
def l2r2(monkeypatch, capsys):
    """Runs a command in this process and gives what it prints."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["l2r2", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert not end.value.code, err
        return out

    return call


def test_train_publish_pull(tmp_path, monkeypatch, l2r2):
    data, run = write_dataset(tmp_path / "data", splits=("train", "val", "test")), tmp_path / "runs" / "squares"
    with HubDouble().running() as double:
        double.connect(monkeypatch, tmp_path / "author", TOKEN)
        made = ("--model", "l2r2_resnet18", "--no-pretrained", "--box-head", "--size", 32, "--epochs", 2)
        l2r2("finetune", data, *made, "-o", run)
        l2r2("evaluate", run, data, "--split", "test")
        config = tmp_path / "configs" / "l2r2_resnet18.squares.yaml"
        options = ("--license", "mit", "--data", "Squares", "--hub-config", config, "--push", "--json")
        assert json.loads(l2r2("publish", run, "org/squares", *options))["problems"] == []
        assert b"split test: 12 images" in double.repos["org/squares"].files("main")[1]["README.md"]
        written = parse_hub_config(yaml.safe_load(config.read_text()), str(config))
        assert {m["output"] for m in written.metrics} == {"full", "fg", "fused"} and str(tmp_path) not in config.read_text()

        model = hub.load_checkpoint(run).model
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
        boxes = torch.tensor([[2.0, 2, 20, 30], [float("nan")] * 4])
        with torch.no_grad():
            expected = [model(x).tolist(), model(x, boxes).tolist()]
        ways = ("timm=l2r2_resnet18.squares", "timm=hf-hub:org/squares", "predictor=org/squares", "transformers=org/squares")
        pulls = [pull(double, tmp_path / "user", way, L2R2_HUB_CONFIGS=str(config.parent)) for way in ways]
        predict = [sys.executable, "-m", "l2r2_models", "predict", "org/squares", str(data), "--split", "test", "-o"]
        there = double.environment(tmp_path / "user", OMP_NUM_THREADS="1")
        predicting = subprocess.Popen([*predict, str(tmp_path / "hub.json")], env=there, stderr=subprocess.PIPE, text=True)
        answers = [process.communicate() for process in pulls]
        got = [json.loads(line) for out, _ in answers for line in out.splitlines()]
        assert got == [expected] * len(ways), "".join(err[-2000:] for _, err in answers)
        _, err = predicting.communicate()
        assert predicting.returncode == 0, err[-2000:]
        l2r2("predict", run, data, "--split", "test", "-o", tmp_path / "run.json")
        images = [json.loads((tmp_path / out).read_text())["images"] for out in ("hub.json", "run.json")]
        assert images[0] == images[1] and len(images[0]) == 12


def test_a_folder_of_hub_configs_is_listed(tmp_path):
    config = replace(
        load_hub_configs()[0],
        tag="squares",
        default=False,
        hub_id="org/squares",
        architecture="l2r2_resnet18",
        label_names=["a", "b"],
        model_args={"branches": ["full"]},
    )
    (tmp_path / "l2r2_resnet18.squares.yaml").write_text(config.to_yaml())
    code = "import timm, l2r2_models; print(timm.create_model('l2r2_resnet18.squares').branches)"
    env = {**os.environ, "L2R2_HUB_CONFIGS": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert made.stdout.strip() == "('full',)", made.stderr[-1000:]

"""Train, evaluate, publish, and pull again in fresh processes by every way: the same logits, the same predictions."""

import json
import subprocess
import sys

import torch
from conftest import write_dataset
from hub_double import TOKEN, HubDouble
from test_hub_pull import pull

from l2r2_models import hub


def l2r2(*arguments, env):
    command = [sys.executable, "-m", "l2r2_models.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**env, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_train_publish_pull(tmp_path):
    data, run = write_dataset(tmp_path / "data", splits=("train", "val", "test")), tmp_path / "runs" / "squares"
    with HubDouble().running() as double:
        here = double.environment(tmp_path / "author", TOKEN)
        l2r2("finetune", data, "--model", "l2r2_resnet18", "--no-pretrained", "--size", 32, "--epochs", 2, "-o", run, env=here)
        l2r2("evaluate", run, data, "--split", "test", env=here)
        config = tmp_path / "configs" / "l2r2_resnet18.squares.yaml"
        options = ("--licence", "mit", "--data", "Squares", "--hub-config", config, "--push", "--json")
        assert json.loads(l2r2("publish", run, "org/squares", *options, env=here))["problems"] == []
        assert b"split test: 12 images" in double.repos["org/squares"].files("main")[1]["README.md"]

        model = hub.load_checkpoint(run).model
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
        boxes = torch.tensor([[2.0, 2, 20, 30], [float("nan")] * 4])
        with torch.no_grad():
            expected = [model(x).tolist(), model(x, boxes).tolist()]
        ways = ("timm=l2r2_resnet18.squares", "timm=hf-hub:org/squares", "predictor=org/squares", "transformers=org/squares")
        pulls = [pull(double, tmp_path / "user", way, L2R2_HUB_CONFIGS=str(config.parent)) for way in ways]
        answers = [process.communicate(timeout=280) for process in pulls]
        got = [json.loads(line) for out, _ in answers for line in out.splitlines()]
        assert got == [expected] * len(ways), "".join(err[-2000:] for _, err in answers)

        there = double.environment(tmp_path / "user", L2R2_HUB_CONFIGS=str(config.parent))
        for source, out in (("org/squares", "hub.json"), (run, "run.json")):
            l2r2("predict", source, data, "--split", "test", "-o", tmp_path / out, env=there)
        images = [json.loads((tmp_path / out).read_text())["images"] for out in ("hub.json", "run.json")]
        assert images[0] == images[1] and len(images[0]) == 12
        rows = json.loads(l2r2("list", "l2r2_resnet18", "--pretrained", "--json", env=there))
        assert [r["hub_id"] for r in rows if r["tag"] == "squares"] == ["org/squares"]

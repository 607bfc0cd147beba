"""`python -m l2r2_models.timm_script`: timm's own scripts on our models. L2R2_TIMM_CHECKOUT names a checkout of timm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COLORS, write_run
from PIL import Image

CHECKOUT = os.environ.get("L2R2_TIMM_CHECKOUT")
SCRIPT = """
import argparse, sys
import helper
import timm
parser = argparse.ArgumentParser()
parser.add_argument("--model")
arguments = parser.parse_args()
assert __name__ == "__main__"
print(type(timm.create_model(arguments.model)).__name__, helper.NAME, sys.argv[1:])
sys.exit(3)
"""


def run_script(*arguments, **options):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "l2r2_models.timm_script", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


def test_a_script_runs_as_the_main_program_and_knows_our_models(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("NAME = 'helper'")
    result = run_script(tmp_path / "script.py", "--model", "l2r2_resnet18")
    assert result.stdout.strip() == "L2R2 helper ['--model', 'l2r2_resnet18']", result.stderr
    assert result.returncode == 3


def test_a_script_that_does_not_exist(tmp_path):
    result = run_script(tmp_path / "nothing.py")
    assert result.returncode == 1 and "nothing.py: no such script" in result.stderr and "Traceback" not in result.stderr
    result = run_script()
    assert result.returncode == 2 and "usage:" in result.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageFolder with train and validation."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for label, color in COLORS.items():  # the names differ, for timm tells images apart by them
            (folder / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), color).save(folder / split / label / f"{label}_{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("checkpoint") / "run")


@pytest.mark.timm_suite
@pytest.mark.skipif(not CHECKOUT, reason="L2R2_TIMM_CHECKOUT names no checkout of timm's repository")
@pytest.mark.parametrize("script", ["train", "validate", "inference", "benchmark", "onnx_export"])
def test_timms_scripts(script, images, checkpoint, tmp_path):
    if not (Path(CHECKOUT) / f"{script}.py").is_file():
        pytest.skip("timm's source distribution has no scripts; L2R2_TIMM_CHECKOUT can name a checkout of its repository")
    local = f"local-dir:{checkpoint}"
    small = ["--img-size", "32", "--device", "cpu"]
    arguments = {
        "train": [
            images,
            "--model",
            "l2r2_resnet18",
            *small,
            "--num-classes",
            "3",
            "-b",
            "4",
            "--epochs",
            "1",
            "--workers",
            "0",
            "--output",
            tmp_path,
            "--opt",
            "adamw",
            "--lr",
            "1e-3",
            "--warmup-epochs",
            "0",
            "--cooldown-epochs",
            "0",
        ],
        "validate": [
            images / "validation",
            "--model",
            local,
            "--pretrained",
            *small,
            "-b",
            "4",
            "--workers",
            "0",
            "--results-file",
            tmp_path / "results.json",
            "--results-format",
            "json",
        ],
        "inference": [
            images / "validation",
            "--model",
            local,
            "--pretrained",
            *small,
            "-b",
            "4",
            "--workers",
            "0",
            "--results-file",
            tmp_path / "results",
            "--results-format",
            "json",
            "--topk",
            "1",
        ],
        "benchmark": [
            "--model",
            "l2r2_resnet18",
            *small,
            "--bench",
            "inference",
            "-b",
            "2",
            "--num-bench-iter",
            "5",
            "--num-warm-iter",
            "1",
            "--results-file",
            tmp_path / "results.json",
        ],
        "onnx_export": [tmp_path / "model.onnx", "--model", local, "--img-size", "32"],
    }[script]
    result = run_script(Path(CHECKOUT) / f"{script}.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    if script == "validate":
        assert 0 <= json.loads((tmp_path / "results.json").read_text())["top1"] <= 100
    else:
        assert [p for p in tmp_path.rglob("*") if p.is_file()]  # each writes what it found

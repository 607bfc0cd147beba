"""Fixtures that several test files share: small images on disk, a data set with boxes, a tiny trained-looking run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub; read when huggingface_hub is imported

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from l2r2_cli.commands import main
import l2r2_models  # noqa: F401  (registers the models)
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.views import ViewSpec

torch.set_num_threads(1)
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def write_dataset(folder: Path, count: int = 12, splits=("train",), seed: int = 0) -> Path:
    """An imagefolder of noise images with one colored square each; its color is the label, its box is known."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for split in splits:
        for i in range(count):
            label = list(COLORS)[i % len(COLORS)]
            pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
            x, y = int(rng.integers(0, 40)), int(rng.integers(0, 20))
            pixels[y : y + 18, x : x + 18] = COLORS[label]
            name = f"images/{split}_{i:03d}.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append((name, label, split, x, y, x + 18, y + 18))
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label", "split", "x0", "y0", "x1", "y1"), *rows])
    return folder


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "data", splits=("train", "val", "test"))


def write_run(folder: Path, seed: int = 0, **options) -> Path:
    """A checkpoint with random weights of the smallest backbone that is quick on a CPU."""
    torch.manual_seed(seed)
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3, **options)
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32)
    hub.save_checkpoint(model, folder, sorted(COLORS))
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny("owlv2")` -> folder of a tiny random network of that kind, see tests/tiny_models.py and tiny_generative.py."""
    made = {}

    def folder(kind):
        import tiny_generative
        import tiny_models

        if kind not in made:
            makers = tiny_models.MAKERS | tiny_generative.MAKERS
            made[kind] = makers[kind](tmp_path_factory.mktemp(kind) / "model")
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def pictures():
    """Noise that is not square; two images have one shape."""
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (90, 30), (40, 60), (50, 50)]
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture
def l2r2(monkeypatch, capsys):
    """Runs a command in this process, as `main` does it: returncode, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["l2r2", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr())))

    return call


def sentence(result, code=1):
    """The one line of an error, after checking that it is one and no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]

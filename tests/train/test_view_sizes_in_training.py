"""Training with views of different sizes, from the command line to a run that others start from."""

import json

import pytest
from conftest import sentence

from l2r2_models import L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe

SIZES = {"full": 32, "fg": 64}
COMMON = ("--no-pretrained", "--set", "sizes={full: 32, fg: 64}", "--epochs", "1", "--batch-size", "6")


def test_a_run_keeps_the_sizes_and_so_does_one_that_starts_from_it(dataset, tmp_path, l2r2):
    options = ("--model", "timm:resnet10t", *COMMON, "--box-head", "--set", "branch_backward=separate")
    one = l2r2("finetune", dataset, *options, "-o", tmp_path / "one")
    assert one.returncode == 0, one.stderr  # batch norm, but no pass is shared
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model_args"]["views"]["sizes"] == SIZES
    assert l2r2("evaluate", tmp_path / "one", dataset, "--split", "test").returncode == 0
    two = l2r2("finetune", dataset, "--init", tmp_path / "one", "--epochs", "1", "-o", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    spec = load_checkpoint(tmp_path / "two").model.view_spec
    assert {branch: spec.size_of(branch) for branch in SIZES} == SIZES


def test_sizes_that_do_not_fit_are_reported_before_the_images_are_read(dataset, tmp_path, l2r2):
    line = sentence(l2r2("finetune", dataset, "--model", "timm:vit_tiny_patch16_224", *COMMON, "-o", tmp_path / "run"))
    assert "vit_tiny_patch16_224 takes views of 224 x 224 pixels only" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sizes": {"bg": 32}}, "sizes has a size for bg, but this model has full, fg"),
        ({"sizes": {"fg": 5000}}, "size for fg must be between 1 and 4096 pixels, got 5000"),
        ({"sizes": 32}, "sizes must be a mapping"),
        ({"sizes": {"full": 32}, "fg_mode": "late", "size": 64}, "fg sees the full view, so their sizes must be equal"),
    ],
)
def test_refusals(changes, why):
    with pytest.raises(L2R2Error, match=why):
        create_model(Recipe.default("timm:resnet10t", False, **changes), 3)

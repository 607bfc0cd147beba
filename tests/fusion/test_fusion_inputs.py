"""Which branches are fused: fg with bg and full only as the fallback; every pair from one run; macro accuracy."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.evaluate.evaluator import evaluate_run
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.evaluate.metrics import macro_accuracy, row_weights
from l2r2_models.fusion import create_fusion, fuse_branches
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe
from l2r2_models.views import ViewSpec

THREE = ("full", "fg", "bg")


def logits_of(*branches, rows=40, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {b: torch.randn(rows, classes, generator=generator) for b in branches}


@pytest.mark.parametrize("inputs", [("fg", "bg"), ("fg", "full"), ("full", "bg"), THREE])
def test_only_the_inputs_are_fused_and_full_is_the_fallback(inputs):
    logits, has_fg = logits_of(*THREE), torch.arange(40) % 3 > 0
    fusion = create_fusion({"name": "average", "inputs": inputs}, THREE, 4)
    fused = fuse_branches(fusion, logits, has_fg)
    assert torch.allclose(fused[has_fg], torch.stack([logits[b] for b in inputs]).mean(0)[has_fg])
    assert torch.equal(fused[~has_fg], logits["full"][~has_fg])
    other = {**logits, **{b: z + 1 for b, z in logits.items() if b not in inputs}}
    assert torch.equal(fuse_branches(fusion, other, has_fg)[has_fg], fused[has_fg])
    again = create_fusion(fusion.config(), THREE, 4)
    assert again.config() == fusion.config() and torch.equal(fuse_branches(again, logits, has_fg), fused)


@pytest.mark.parametrize("inputs", [["fg"], ["fg", "fg"], ["fg", "sky"], "fg", ["fg", "bg"]])
def test_inputs_that_are_no_two_branches_of_the_model_are_refused(inputs):
    with pytest.raises(L2R2Error, match=r"two or more of the branches full, fg, got"):
        create_fusion({"name": "robust", "inputs": inputs}, ("full", "fg"), 4)


@pytest.fixture
def three(tmp_path):
    torch.manual_seed(0)
    fusion = {"name": "average", "inputs": ["fg", "bg"]}
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3, branches=THREE, fusion=fusion)
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32)
    save_checkpoint(model, tmp_path / "run", ["blue", "green", "red"])
    return tmp_path / "run"


def test_the_inputs_travel_in_the_checkpoint(three):
    model = load_checkpoint(three).model
    assert model.fusion.over == ("fg", "bg")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    with_box, without = Predictor.from_pretrained(three)([image, image], [[[5, 5, 30, 30]], []])
    assert without.objects[0].source == "full" and without.label == without.objects[0].full.label
    assert "whole image" not in with_box.objects[0].reason  # it has no say where an object was found
    model.reset_classifier(5)
    assert model.fusion.over == ("fg", "bg")


def test_one_run_reports_every_pair_and_fits_the_requested_one(three, dataset):
    rows = evaluate_run(three, dataset, "test", fit_split="val").rows
    for pair in ("fg + full", "fg + bg", "full + bg"):
        assert {f"average ({pair})", f"robust ({pair})", f"weighted_logits ({pair})"} <= set(rows)
    assert "average" in rows and "fused: average" in rows
    assert rows["average (fg + bg)"]["accuracy"] == rows["fused: average"]["accuracy"]
    report = fit_run(three, dataset, "val", method="weighted_logits", inputs=("full", "bg"))
    assert report.config["inputs"] == ["full", "bg"]
    assert load_checkpoint(three).model.fusion.weights.shape == (2, 3)
    assert fit_run(three, dataset, "val", method="robust").config["inputs"] == ["full", "bg"]  # as the run has it now
    result = CliRunner().invoke(app, ["fuse", str(three), str(dataset), "--method", "average", "--inputs", "fg,bg", "--json"])
    assert json.loads(result.stdout)["config"] == {"name": "average", "inputs": ["fg", "bg"], "batch": True}


def test_a_model_without_full_says_that_fg_guesses_on_the_whole_image(tmp_path):
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3, branches=("fg", "bg"))
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32)
    save_checkpoint(model, tmp_path / "run", ["blue", "green", "red"])
    reason = Predictor.from_pretrained(tmp_path / "run")(Image.new("RGB", (40, 40))).objects[0].reason
    assert reason.startswith("no box was given; the model has no full branch") and "not trained on" in reason


# ---- macro accuracy ----


def rare_classes(rows=200):
    """Class 2 is rare and only the context knows it; it also takes some images of the others for class 2."""
    labels = torch.where(torch.arange(rows) % 20 == 0, 2, torch.arange(rows) % 2)
    sure = torch.nn.functional.one_hot(labels, 3).float()
    fg, context = 4 * sure, 3 * sure
    fg[labels == 2] = torch.tensor([1.5, 0.0, 0.0])
    hard = (labels != 2) & (torch.arange(rows) % 5 == 1)
    fg[hard], context[hard] = 1.2 * sure[hard], torch.tensor([0.0, 0.0, 2.5])
    return fg, context[None], labels


def test_weights_of_rows_make_accuracy_macro_accuracy():
    labels, answers = torch.randint(0, 5, (300,)), torch.randint(0, 6, (300,))
    right = (answers == labels).double()
    found = float((right * row_weights(labels, "macro_accuracy")).mean())
    assert found == pytest.approx(macro_accuracy(answers, labels)) == pytest.approx(balanced_accuracy_score(labels, answers))
    with pytest.raises(L2R2Error, match='Unknown metric "f1"; choose from accuracy, macro_accuracy'):
        row_weights(labels, "f1")


@pytest.mark.parametrize("name", ["robust", "scaled_weighted_average"])
def test_thresholds_and_weights_can_be_fitted_by_macro_accuracy(name):
    fg, context, labels = rare_classes()
    found = {}
    for metric in ("accuracy", "macro_accuracy"):
        fusion = create_fusion(name, 2, 3)
        fusion.fit(fg, context, labels, row_weights(labels, metric))
        answers = fusion(fg, context).argmax(-1)
        found[metric] = {"accuracy": float((answers == labels).float().mean()), "macro_accuracy": macro_accuracy(answers, labels)}
    for metric, other in (("accuracy", "macro_accuracy"), ("macro_accuracy", "accuracy")):
        assert found[metric][metric] >= found[other][metric]
    assert found["macro_accuracy"]["macro_accuracy"] > found["accuracy"]["macro_accuracy"]


# ---- recipe keys ----


def test_view_settings_are_recipe_keys_that_the_run_keeps(dataset, tmp_path):
    keys = {
        "bg": "box",
        "square": False,
        "fill": [0, 10, 20],
        "interpolation": "bilinear",
        "branches": THREE,
        "fusion_inputs": ["fg", "bg"],
        "size": 32,
        "epochs": 1,
        "best_metric": "fused_macro_accuracy",
    }
    recipe = Recipe.read("scratch", {"model": "timm:resnet10t", **keys})
    run = finetune(dataset, recipe, tmp_path / "run", val_split="val").folder
    model = load_checkpoint(run).model
    spec = model.view_spec
    assert (spec.bg, spec.square, spec.fill, spec.interpolation) == ("box", False, (0, 10, 20), "bilinear")
    assert model.fusion.over == ("fg", "bg")
    assert Recipe.read(run / "recipe.yaml") == recipe
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert "fused_macro_accuracy" in metrics


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bg": "sky"}, 'Unknown bg "sky"'),
        ({"fill": [0, 0]}, "fill must be three numbers"),
        ({"fill": "red"}, "fill must be a list of whole numbers"),
        ({"mode": "pil", "square": False}, "must be square"),
        ({"interpolation": "lanczos"}, 'Unknown interpolation "lanczos"'),
        ({"fusion_inputs": ["fg", "bg"]}, "two or more of the branches full, fg"),
        ({"best_metric": "bg_macro_accuracy"}, "needs the branch bg"),
    ],
)
def test_view_settings_that_cannot_be_are_refused_before_the_work(changes, why, dataset, tmp_path):
    with pytest.raises(L2R2Error, match=why):
        finetune(dataset, Recipe.read("scratch", {"model": "timm:resnet10t", "size": 32, **changes}), tmp_path / "run")

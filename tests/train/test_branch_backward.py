"""branch_backward=separate: the gradients of joint training, with one branch in memory at a time."""

import weakref

import pytest
import torch
from conftest import write_dataset
from safetensors.torch import load_file
from test_processes import COMMAND, TWO, start

from l2r2_models import L2R2Error
from l2r2_models.train.finetune import finetune
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe

VIT = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
CASES = {
    "mixing": ("timm:test_vit", {"mixup": 0.8, "cutmix": 1.0, "grad_accumulation": 2, "branches": ("full", "fg", "bg")}),
    "two backgrounds": ("timm:test_vit", {"consistency": 4.0, "grad_accumulation": 2, "background_swap": 0.5}),
    "tokens": ("timm:vit_tiny_patch16_224", {"backbone": VIT, "fg_mode": "tokens"}),
    "box head": ("timm:test_convnext", {"box_head": True, "precision": "bf16"}),
    "own networks": ("timm:resnet10t", {"shared": False}),
    "frozen batch norm": ("timm:resnet10t", {"trainable": "head"}),
    "batch norm of one branch": ("timm:resnet10t", {"branches": ("full",)}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve training images, of which two have no box."""
    folder = write_dataset(tmp_path_factory.mktemp("separate") / "data", count=12)
    lines = (folder / "metadata.csv").read_text().splitlines()
    lines[1:3] = [",".join(line.split(",")[:3]) + ",,,," for line in lines[1:3]]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def recipe(model="timm:test_vit", **changes):
    settings = {"size": 32, "epochs": 2, "batch_size": 5, "optimizer": "sgd", "lr": 0.05, "label_smoothing": 0.1}
    settings = {**settings, "precision": "fp32", **changes}
    return Recipe.default(model, False, **settings)


@pytest.mark.parametrize("case", CASES)
def test_one_branch_after_the_other_gives_the_gradients_of_both(data, tmp_path, case):
    model, changes = CASES[case]
    for name in ("joint", "separate"):
        finetune(data, recipe(model, branch_backward=name, **changes), tmp_path / name)
    joint, separate = (load_file(tmp_path / name / "model.safetensors") for name in ("joint", "separate"))
    tolerance = 1e-3 if changes.get("precision") == "bf16" else 1e-6
    for key, value in joint.items():
        assert torch.allclose(separate[key], value, rtol=10 * tolerance, atol=tolerance), key


def most_saved(action):
    """The largest number of bytes that autograd saved at any one time."""
    held = {"now": 0, "most": 0}

    class Saved:
        def __init__(self, value):
            self.value = value
            size = value.nbytes
            held["now"] += size
            held["most"] = max(held["most"], held["now"])
            weakref.finalize(self, lambda: held.update(now=held["now"] - size))

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.value):
        action()
    return held["most"]


def test_the_activations_of_one_branch_are_half_of_those_of_two(data, tmp_path):
    def saved(name, **changes):
        of_run = recipe(epochs=1, size=96, batch_size=10, **changes)
        return most_saved(lambda: finetune(data, of_run, tmp_path / name))

    separate, alone = saved("separate", branch_backward="separate"), saved("alone", branches=("full",))
    assert 0.9 * alone < separate < 1.1 * alone  # what a plain classifier needs
    assert separate < 0.6 * saved("joint")


@pytest.mark.parametrize(
    ("model", "changes", "why"),
    [
        ("timm:resnet10t", {}, "resnet10t has batch norm, whose statistics are those of all branches together"),
        ("timm:test_convnext", {"fg_mode": "late"}, "one forward pass serves both branches"),
        ("ifam_vit_tiny_patch16_224", {"backbone": {"depth": 2}}, "sends its gradient through stage 1"),
        ("timm:test_vit", {"branch_backward": "one"}, 'Unknown branch_backward "one"; choose from joint, separate'),
    ],
)
def test_refusals(model, changes, why):
    with pytest.raises(L2R2Error, match=why):
        create_model(recipe(model, **{"branch_backward": "separate", **changes}), 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", [{}, {"grad_checkpointing": True, "grad_accumulation": 2}], ids=["plain", "checkpointing"])
def test_two_processes_give_the_result_of_one(data, tmp_path, changes):
    settings = {
        "size": 32,
        "epochs": 2,
        "batch_size": 8,
        "optimizer": "sgd",
        "lr": 0.05,
        "precision": "fp32",  # bf16 depends on how a batch is split
        "branch_backward": "separate",
        **changes,
    }
    finetune(data, Recipe.default("timm:test_vit", False, **settings), tmp_path / "one")
    options = ["--model", "timm:test_vit", "--no-pretrained", *(f"--set={key}={value}" for key, value in settings.items())]
    two = start(*TWO, *COMMAND, data, *options, "-o", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=1e-5, atol=1e-6), key

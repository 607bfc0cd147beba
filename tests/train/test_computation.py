"""What a training leaves to the hardware, what a continued run keeps of it, and torch.compile."""

import json

import pytest
import torch
from safetensors.torch import load_file

from l2r2_models import L2R2Error
from l2r2_models.train import computation
from l2r2_models.train.computation import check_compiler, resolve
from l2r2_models.train.finetune import finetune
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe


def recipe(model="timm:resnet10t", **changes):
    return Recipe.default(model, False, **{"size": 32, "epochs": 1, "batch_size": 6, **changes})


def chosen(monkeypatch, model, *, bf16, before=(), **changes):
    """Precision and channels_last on a CPU that has bf16 instructions, or none."""
    monkeypatch.setattr(computation, "has_bf16", lambda device: bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = recipe(model, **changes)
    resolved = resolve(settings, create_model(settings, 3), dict(before))
    return resolved.precision, resolved.channels_last


@pytest.mark.parametrize(
    ("model", "bf16", "expected"),
    [
        ("timm:resnet10t", True, ("bf16", True)),
        ("timm:resnet10t", False, ("fp32", True)),
        ("timm:test_vit", True, ("bf16", False)),
        ("timm:test_convnext", True, ("fp32", True)),  # depthwise convolutions are slower in bf16
    ],
)
def test_auto_is_what_the_hardware_is_fast_at(monkeypatch, model, bf16, expected):
    assert chosen(monkeypatch, model, bf16=bf16) == expected


def test_a_recipe_that_says_which_is_followed(monkeypatch):
    assert chosen(monkeypatch, "timm:resnet10t", bf16=True, precision="fp32") == ("fp32", True)
    assert chosen(monkeypatch, "timm:resnet10t", bf16=True, channels_last=False) == ("bf16", False)


def test_a_continued_run_keeps_what_was_chosen(monkeypatch):
    before = {"precision": "fp32", "channels_last": False}
    assert chosen(monkeypatch, "timm:resnet10t", bf16=True, before=before.items()) == ("fp32", False)


def test_an_interrupted_run_goes_on_as_it_began_on_other_hardware(dataset, tmp_path, monkeypatch):
    """It began where bf16 is fast; only run.json knows."""
    settings = recipe(optimizer="sgd", lr=0.05)
    exact = finetune(dataset, recipe(optimizer="sgd", lr=0.05, precision="bf16", channels_last=True), tmp_path / "exact")
    monkeypatch.setattr(computation, "has_bf16", lambda device: True)
    monkeypatch.setattr("l2r2_models.train.trainer.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, settings, tmp_path / "run")
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resolved"] == {"precision": "bf16", "channels_last": True}
    monkeypatch.setattr(computation, "has_bf16", lambda device: False)
    result = finetune(dataset, settings, tmp_path / "run")
    assert result.metrics == exact.metrics
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "exact"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    monkeypatch.setattr(computation, "has_bf16", lambda device: True)
    assert finetune(dataset, settings, tmp_path / "run").was_finished
    finetune(dataset, recipe(optimizer="sgd", lr=0.05, precision="fp32"), tmp_path / "run", overwrite=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]["precision"] == "fp32", "not that of the old run"


@pytest.mark.parametrize(
    "options", [{}, {"workers": 2}, {"grad_accumulation": 2}, {"consistency": 1.0, "batch_size": 4}, {"box_head": True}]
)
def test_views_cut_on_the_device_train_the_same_weights(dataset, tmp_path, options):
    for cut in ("workers", "device"):
        finetune(dataset, recipe(optimizer="sgd", lr=0.05, cut=cut, epochs=2, **options), tmp_path / cut)
    weights, expected = (load_file(tmp_path / cut / "model.safetensors") for cut in ("device", "workers"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_values_that_are_refused():
    with pytest.raises(L2R2Error, match='Unknown cut "gpu"; choose from workers, device'):
        recipe(cut="gpu")
    with pytest.raises(L2R2Error, match="channels_last must be auto, true or false, got 'yes'"):
        recipe(channels_last="yes")


@pytest.mark.parametrize("changes", [{"box_head": True}, {"fg_mode": "late"}])
def test_compile_is_refused_where_it_would_do_nothing(changes):
    with pytest.raises(L2R2Error, match="compile has no effect"):
        check_compiler(create_model(recipe(**changes), 3))


def test_a_machine_without_a_compiler(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    without = config.patch({"cpp.cxx": (str(tmp_path / "missing-compiler"),), "force_disable_caches": True})
    with without, pytest.raises(L2R2Error, match=r"compile needs a C\+\+ compiler"):
        check_compiler(create_model(recipe(), 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_backbone_learns_the_same(dataset, tmp_path):
    settings = {"optimizer": "sgd", "lr": 0.05, "precision": "fp32", "ema": 0.5}
    for name, compiled in (("plain", False), ("compiled", True)):
        finetune(dataset, recipe("timm:test_vit", compile=compiled, **settings), tmp_path / name)
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        assert torch.allclose(compiled[key], value, rtol=1e-3, atol=1e-5), key

"""Checkpoints: written once, loaded by timm, by transformers and by us, and refused with a sentence if damaged."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import COLORS, write_run
from PIL import Image
from safetensors.torch import load_file, save_file

from l2r2_models import L2R2, L2R2Error, Predictor, ViewSpec, make_views
from l2r2_models.checkpoints import checkpoint as hub


def edit_config(run, change):
    path = run / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_checkpoint_is_safetensors_and_json_only(run):
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((run / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert config["label_names"] == sorted(COLORS)
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["model_args"]["format_version"] == hub.FORMAT_VERSION
    assert not {*config["model_args"]} & {*config["l2r2"]}  # each thing is said once
    assert (run / "model.safetensors").stat().st_mode & 0o044  # readable for others, as the config is


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branches": ("full",)},
        {"branches": ("full", "fg", "bg"), "fusion": "average"},
        {"shared": False, "fusion": {"name": "robust", "threshold": 0.25}},
    ],
)
def test_every_kind_of_model_comes_back_with_equal_logits(tmp_path, options):
    run = write_run(tmp_path / "run", **options)
    loaded = hub.load_checkpoint(run).model
    again = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    views = {b: torch.randn(2, 3, 32, 32) for b in loaded.branches}
    out, other = loaded.forward_views(**views), again.forward_views(**views)
    assert torch.equal(out.fused, other.fused)
    assert loaded.branches == tuple(options.get("branches", ("full", "fg")))
    assert loaded.fusion.config() == again.fusion.config()
    assert loaded.view_spec == again.view_spec and loaded.view_spec.size == 32
    weights = load_file(run / "model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in loaded.state_dict().items())


def test_a_fixed_size_vit_comes_back_at_its_own_size(tmp_path):
    model = timm.create_model("l2r2_vit_tiny_patch16_224", img_size=64, depth=1, num_classes=3)
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=64)
    hub.save_checkpoint(model, tmp_path, ["a", "b", "c"])
    loaded = hub.load_checkpoint(tmp_path).model
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model.eval()(x))


def test_the_backbones_own_arguments_come_back(tmp_path):
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3, global_pool="max", output_stride=8)
    hub.save_checkpoint(model, tmp_path, ["a", "b", "c"])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(hub.load_checkpoint(tmp_path).model(x), model.eval()(x))


def test_the_fusion_can_be_chosen_when_loading(run):
    model = timm.create_model(f"local-dir:{run}", pretrained=True, fusion="average")
    assert model.fusion.name == "average"
    model = timm.create_model(f"local-dir:{run}", pretrained=True, fusion={"name": "robust", "threshold": 0.9})
    assert model.fusion.name == "robust"


def test_transformers_reads_the_same_folder(run):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    ours = hub.load_checkpoint(run).model
    theirs = AutoModelForImageClassification.from_pretrained(run).eval()
    x, boxes = torch.randn(2, 3, 32, 32), torch.tensor([[2.0, 2, 20, 30], [float("nan")] * 4])
    assert torch.equal(theirs(pixel_values=x).logits, ours(x))
    assert torch.equal(theirs(pixel_values=x, boxes=boxes).logits, ours(x, boxes))
    classify = pipeline("image-classification", model=theirs, image_processor=AutoImageProcessor.from_pretrained(run))
    answer = classify(Image.new("RGB", (64, 64), (200, 30, 30)))
    assert {a["label"] for a in answer} == set(COLORS)


def test_a_bare_import_of_timm_says_unknown_model_and_ours_registers_it(run):
    code = "import {0} timm; m = timm.create_model('local-dir:{1}', pretrained=True); print(m.num_classes)"
    with_us = subprocess.run([sys.executable, "-c", code.format("l2r2_models,", run)], capture_output=True, text=True)
    without = subprocess.run([sys.executable, "-c", code.format("", run)], capture_output=True, text=True)
    assert with_us.stdout.strip() == "3"
    assert "Unknown model" in without.stderr


def test_refusals_name_the_file_and_say_why(tmp_path):
    run = write_run(tmp_path / "run")
    cases = {
        "is newer than": lambda c: c["model_args"].update(format_version=99),
        "from 1, got True": lambda c: c["model_args"].update(format_version=True),
        "from 1, got 0": lambda c: c["model_args"].update(format_version=0),
        "from 1, got None": lambda c: c["model_args"].pop("format_version"),
        "run: The backbone of l2r2_resnet18 is resnet18": lambda c: c.update(architecture="l2r2_resnet18"),
        "no l2r2 section": lambda c: c.pop("l2r2"),
        'Unknown fusion "magic"': lambda c: c["model_args"].update(fusion={"name": "magic"}),
        "Unknown model": lambda c: c.update(architecture="l2r2_resnat18"),
        "no valid views under model_args": lambda c: c["model_args"].update(views=3),
        "no valid branches under model_args": lambda c: c["model_args"].pop("branches"),
        "unknown key color under l2r2": lambda c: c["l2r2"].update(color="red"),
        "invalid localizer under l2r2": lambda c: c["l2r2"].update(localizer="owlv2"),
        r"architecture resnet10t in config\.json is not": lambda c: c.update(architecture="resnet10t"),
        "points to external weights": lambda c: c["pretrained_cfg"].update(url="https://example.org/model.pth"),
        "model_args as a mapping": lambda c: c.update(model_args=[]),
        "2 label_names for 3 classes": lambda c: c.update(label_names=["a", "b"]),
    }
    good = (run / "config.json").read_text()
    for message, change in cases.items():
        (run / "config.json").write_text(good)
        edit_config(run, change)
        with pytest.raises(L2R2Error, match=message):
            hub.load_checkpoint(run)


def test_timm_refuses_a_newer_format_too(tmp_path):
    run = write_run(tmp_path / "run")
    edit_config(run, lambda c: c["model_args"].update(format_version=hub.FORMAT_VERSION + 1))
    with pytest.raises(L2R2Error, match="is newer than"):
        timm.create_model(f"local-dir:{run}", pretrained=True)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("size", [(300, 150), (90, 200)])
def test_timms_and_transformers_transforms_show_what_the_full_view_shows(tmp_path, square, size):
    """The model was trained on whole photos; timm's default cuts the sides off."""
    from timm.data import create_transform, resolve_data_config
    from transformers import AutoImageProcessor

    run = write_run(tmp_path / "run")
    checkpoint = hub.load_checkpoint(run)
    checkpoint.model.view_spec = ViewSpec.from_dict({**checkpoint.model.view_spec.to_dict(), "square": square, "size": 64})
    hub.save_checkpoint(checkpoint.model, run, checkpoint.labels)
    rows, columns = np.mgrid[: size[1], : size[0]]
    photo = Image.fromarray(np.stack([rows % 256, columns % 256, (rows + columns) // 2 % 256], -1).astype(np.uint8))
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    wanted = make_views([photo], None, model.view_spec, branches=("full",)).full
    got = create_transform(**resolve_data_config(model.pretrained_cfg))(photo)[None]
    processed = AutoImageProcessor.from_pretrained(run)(photo, return_tensors="pt")["pixel_values"]
    for view in (got, processed):
        assert view.shape == wanted.shape and (view - wanted).abs().mean() < 0.05
    assert hub.load_checkpoint(run).model.view_spec == model.view_spec == checkpoint.model.view_spec
    assert ViewSpec.from_pretrained_cfg(model.pretrained_cfg, square=square) == model.view_spec


def test_pickles_beside_the_weights_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "optimizer.pt").write_bytes(b"")  # of a training that goes on: not of the checkpoint
    hub.load_checkpoint(run)
    for name in ("pytorch_model.bin", "model.PTH", "anything.pkl"):
        (run / name).write_bytes(b"\x80\x04")
        with pytest.raises(L2R2Error, match="pickled weights are never loaded"):
            hub.load_checkpoint(run)
        (run / name).unlink()


def test_the_localizer_and_fitted_temperatures_are_in_the_config(tmp_path):
    run = write_run(tmp_path / "run", fusion="scaled_average")
    model = hub.load_checkpoint(run).model
    model.fusion.temperatures.copy_(torch.tensor([[1.5], [0.5]]))  # fg first
    localizer = {"spec": "owlv2", "prompt": "bird", "license": "apache-2.0"}
    hub.save_checkpoint(model, run, sorted(COLORS), localizer=localizer)
    assert json.loads((run / "config.json").read_text())["l2r2"]["calibration"] == {"temperatures": {"fg": 1.5, "full": 0.5}}
    loaded = hub.load_checkpoint(run)
    assert loaded.localizer == localizer and torch.equal(loaded.model.fusion.temperatures, model.fusion.temperatures)


def test_damaged_or_missing_files_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(L2R2Error, match="cannot be loaded"):
        hub.load_checkpoint(run)
    tensors = {"something": torch.zeros(1)}
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(L2R2Error, match="cannot be loaded"):
        hub.load_checkpoint(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(L2R2Error, match=r"has no model\.safetensors"):
        hub.load_checkpoint(run)
    (run / "config.json").write_text("{")
    (run / "model.safetensors").write_bytes(weights)
    with pytest.raises(L2R2Error, match=r"config\.json: is not readable JSON"):
        hub.load_checkpoint(run)


def test_unknown_names_say_what_to_do():
    with pytest.raises(L2R2Error, match="no such folder; for a repository on the Hub, use hf-hub:org/name"):
        hub.load_checkpoint("no/such/folder/here")
    with pytest.raises(L2R2Error, match="hf download nobody/nothing"):
        Predictor.from_pretrained("nobody/nothing")  # offline in tests


def test_labels_must_fit(tmp_path):
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3)
    with pytest.raises(L2R2Error, match="2 labels for 3 classes"):
        hub.save_checkpoint(model, tmp_path, ["a", "b"])
    with pytest.raises(L2R2Error, match=r"made by timm\.create_model"):
        hub.save_checkpoint(L2R2("resnet10t", num_classes=3), tmp_path, ["a", "b", "c"])

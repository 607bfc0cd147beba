"""Runs without training: derived from a timm classifier, and joined from independent networks and split again."""

import sys
from dataclasses import replace

import pytest
import timm
import torch
from conftest import COLORS, write_run
from hub_double import HubDouble
from safetensors.torch import save
from timm.models import save_for_hf

from l2r2_cli.commands import main
from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.checkpoints import convert as derive


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A Hub that has timm's resnet18.a1_in1k and a small ViT, with random weights."""
    torch.manual_seed(0)
    with HubDouble().running() as double:
        double.connect(monkeypatch, tmp_path / "home")
        for name in ("resnet18.a1_in1k", "resnet10t.c3_in1k"):
            model = timm.create_model(name.split(".")[0])
            double.add(f"timm/{name}", {"model.safetensors": save(model.state_dict()), "config.json": b"{}"})
        yield double


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "resnet10t.c3_in1k"])
def test_a_timm_classifier_becomes_a_run_with_the_same_predictions(there, tmp_path, name):
    _, labels = derive.derive(name, tmp_path / "run")
    source = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        loaded = hub.load_checkpoint(tmp_path / "run")
        out = loaded.model.forward_views(x, x)
        assert torch.equal(out.full, source(x)) and torch.equal(out.fg, source(x))
    assert len(set(labels)) == 1000 and loaded.labels[1] == "goldfish"
    assert sum(label.startswith("crane (n") for label in labels) == 2
    assert loaded.training == {"derived_from": f"timm:{name}"}
    assert loaded.model.pretrained_cfg["architecture"] == ("l2r2_resnet18" if "18" in name else "l2r2")


def test_the_command_derives(there, tmp_path, monkeypatch, capsys):
    def l2r2(*arguments):
        monkeypatch.setattr(sys, "argv", ["l2r2", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, "".join(capsys.readouterr())

    (tmp_path / "labels.txt").write_text("\n".join(f"class {i}" for i in range(1000)))
    options = ("--labels", tmp_path / "labels.txt", "--branches", "full,fg,bg", "-o", tmp_path / "run")
    code, text = l2r2("derive", "timm:resnet10t", *options)
    assert code == 0 and "1000 classes; not trained" in text
    assert hub.load_checkpoint(tmp_path / "run").model.branches == ("full", "fg", "bg")
    for source, sentence in (("timm:resnet10t", "already contains a checkpoint"), ("resnet10t", "write timm:NAME")):
        code, text = l2r2("derive", source, "-o", tmp_path / "run")
        assert code == 1 and sentence in text and "Traceback" not in text


def test_what_cannot_be_derived(there, tmp_path):
    for name, sentence in (
        ("resnat18", "Unknown timm backbone"),
        ("resnet18.nonsense", "nonsense"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "have no classifier"),
        ("vit_pe_core_tiny_patch16_384.fb", "have no classifier"),  # only a projection into the space of its texts
        ("resnet34.a1_in1k", "resnet34.a1_in1k: cannot be converted"),  # the Hub does not have it
    ):
        with pytest.raises(L2R2Error, match=sentence):
            derive.derive(name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_networks_are_put_together_and_taken_apart(tmp_path):
    alone = {b: write_run(tmp_path / b, seed=i, branches=(b,)) for i, b in enumerate(("full", "fg", "bg"))}
    checkpoint = hub.load_checkpoint(alone["fg"])
    checkpoint.model.view_spec = ViewSpec(size=32, fg_mode="masked_crop", margin=0.25)
    # the same classes in another order: the heads are told apart by name
    hub.save_checkpoint(checkpoint.model, alone["fg"], ("red", "green", "blue"))
    model = derive.join(alone, tmp_path / "joint", fusion="average")
    loaded = hub.load_checkpoint(tmp_path / "joint").model
    views = {b: torch.randn(2, 3, 32, 32) for b in alone}
    with torch.inference_mode():
        together = loaded.forward_branches(**views)
        for branch, run in alone.items():
            single = hub.load_checkpoint(run).model.forward_branches(**{branch: views[branch]})[branch]
            wanted = single.flip(1) if branch == "fg" else single
            assert torch.equal(together[branch], wanted), branch
    assert not loaded.shared and loaded.view_spec.fg_mode == "masked_crop" and loaded.view_spec.margin == 0.25
    assert model.fusion.name == "average" and "red" in Predictor.from_pretrained(tmp_path / "joint").labels

    folders = derive.split(tmp_path / "joint", tmp_path / "parts")
    again = hub.load_checkpoint(derive.join(folders, tmp_path / "again") and tmp_path / "again").model
    with torch.inference_mode():
        for branch, logits in again.forward_branches(**views).items():
            assert torch.equal(logits, together[branch])


def test_plain_timm_checkpoints_can_be_put_together(tmp_path):
    models = {}
    for branch in ("full", "fg"):
        models[branch] = timm.create_model("resnet10t", num_classes=3).eval()
        save_for_hf(models[branch], tmp_path / branch, {"label_names": sorted(COLORS)}, safe_serialization=True)
    loaded = derive.join({b: tmp_path / b for b in models}, tmp_path / "joint")
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        out = loaded.forward_views(x, x)
        assert torch.equal(out.full, models["full"](x)) and torch.equal(out.fg, models["fg"](x))


def test_each_network_brings_how_its_own_view_is_cut(tmp_path):
    alone = {b: write_run(tmp_path / b, seed=i, branches=(b,)) for i, b in enumerate(("full", "fg", "bg"))}
    own = {"fg_mode": "late", "late_stage": "before_last", "late_pool": "all", "coverage": 0.5, "margin": 0.1}
    for branch, changes in (("fg", own), ("bg", {"bg": "box"})):
        checkpoint = hub.load_checkpoint(alone[branch])
        checkpoint.model.view_spec = replace(checkpoint.model.view_spec, **changes)
        hub.save_checkpoint(checkpoint.model, alone[branch], checkpoint.labels)
    joint = derive.join(alone, tmp_path / "joint").view_spec
    assert joint == replace(hub.load_checkpoint(alone["full"]).model.view_spec, **own, bg="box")


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"square": False}, "paddings"), ({"fill": (0, 0, 0)}, "paddings"), ({"interpolation": "bilinear"}, "interpolations")],
)
def test_networks_that_see_whole_images_otherwise_do_not_fit(tmp_path, changes, what):
    alone = {b: write_run(tmp_path / b, branches=(b,)) for b in ("full", "fg")}
    checkpoint = hub.load_checkpoint(alone["fg"])
    checkpoint.model.view_spec = replace(checkpoint.model.view_spec, **changes)
    hub.save_checkpoint(checkpoint.model, alone["fg"], checkpoint.labels)
    with pytest.raises(L2R2Error, match=f"have different {what}"):
        derive.join(alone, tmp_path / "joint")


def test_networks_that_do_not_fit(tmp_path):
    full = write_run(tmp_path / "full", branches=("full",))
    both = write_run(tmp_path / "both")
    with pytest.raises(L2R2Error, match="has the branches full, fg; use a network with one branch"):
        derive.join({"full": full, "fg": both}, tmp_path / "joint")
    with pytest.raises(L2R2Error, match="share one backbone"):
        derive.split(both, tmp_path / "parts")
    checkpoint = hub.load_checkpoint(full)
    hub.save_checkpoint(checkpoint.model, tmp_path / "fg", ("a", "b", "c"))
    with pytest.raises(L2R2Error, match="have different classes"):
        derive.join({"full": full, "fg": tmp_path / "fg"}, tmp_path / "joint")
    assert not (tmp_path / "joint").exists()


def test_convert_needs_to_know_what_for(tmp_path, monkeypatch, capsys):
    for arguments in ([], ["--full", "a"], ["run", "--full", "a"]):
        monkeypatch.setattr(sys, "argv", ["l2r2", "convert", *arguments, "-o", str(tmp_path / "x")])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and "to join" in capsys.readouterr().err.replace("\n", " ").replace("│", "")

"""Starting from a checkpoint: what is copied, what is new, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from conftest import COLORS, write_run
from safetensors.torch import load_file
from timm.models import save_for_hf
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.checkpoints.provenance import source_of_training
from l2r2_models.errors import L2R2Error
from l2r2_models.evaluate.evaluator import evaluate_run
from l2r2_models.fusion import create_fusion
from l2r2_models.train.finetune import finetune
from l2r2_models.train.init import InitCheckpoint
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe

CLASSES = tuple(sorted(COLORS))


def started(init, classes=CLASSES, **keys):
    recipe = Recipe.read("finetune", {"init": str(init), **keys})
    start = InitCheckpoint.read(recipe.init)
    model = create_model(recipe, len(classes), start)
    return model, start.give(model, classes)


def plain(folder, labels=None, name="resnet10t", **options):
    """A timm classifier with random weights, saved by timm itself."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=3, **options)
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3))
    folder.mkdir()
    names = {} if labels is None else {"label_names": list(labels)}
    save_for_hf(model, str(folder), names, options or None, safe_serialization=True)
    return folder


def test_without_a_model_it_is_the_checkpoints_own(tmp_path):
    made = write_run(tmp_path / "a", branches=("full", "fg", "bg"), shared=False)
    saved = hub.load_checkpoint(made).model
    saved.view_spec = replace(saved.view_spec, fg_mode="masked_crop", margin=0.1, square=False, fill=(1, 2, 3), bg="box")
    hub.save_checkpoint(saved, made, CLASSES)
    model, said = started(made)
    assert model.branches == ("full", "fg", "bg") and not model.shared and model.view_spec.fg_mode == "masked_crop"
    assert model.view_spec == hub.load_checkpoint(made).model.view_spec
    weights = load_file(made / "model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if not k.startswith("fusion."))
    assert said == f"started from {made}: its backbone and its heads (full, fg, bg)"
    assert started(made, margin=0.25, size=64)[0].view_spec.size == 64  # what is said wins


def test_other_classes_get_new_heads(run):
    model, said = started(run, classes=("oak", "elm", "ash"), seed=1)
    weights = load_file(run / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in state.items() if k.startswith("backbone."))
    assert not any(torch.equal(state[k], weights[k]) for k in state if k.startswith("heads.") and k.endswith("weight"))
    assert said.endswith("its backbone; new heads: full, fg")
    assert started(run, classes=("a", "b", "c", "d"))[0].num_classes == 4


def test_the_weights_of_a_shared_backbone_start_both_networks(run):
    state = started(run, model="timm:resnet10t", shared=False)[0].state_dict()
    fg = {k.removeprefix("branch_backbones.fg."): v for k, v in state.items() if k.startswith("branch_backbones.fg.")}
    assert fg and all(torch.equal(v, state[f"backbone.{k}"]) for k, v in fg.items())


def test_a_timm_classifier_saved_in_timms_layout(tmp_path):
    folder = plain(tmp_path / "plain", labels=CLASSES)
    source = load_file(folder / "model.safetensors")
    model, said = started(folder)
    state = model.state_dict()
    assert torch.equal(state["backbone.conv1.0.weight"], source["conv1.0.weight"])
    assert torch.equal(state["heads.full.weight"], source["fc.weight"]) and torch.equal(state["heads.fg.bias"], source["fc.bias"])
    assert model.view_spec.mean == (0.1, 0.2, 0.3) and model.view_spec.fill == (26, 51, 76) and "its heads (full, fg)" in said
    assert started(plain(tmp_path / "unnamed"))[1].endswith("new heads: full, fg")


def test_a_vit_of_another_size_and_its_parts(tmp_path):
    """Positions are resized by timm; stage 1 of iFAM has a head of another kind, which a plain classifier cannot start."""
    folder = plain(tmp_path / "vit", CLASSES, "test_vit", img_size=64)
    small = {"embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3}
    model, _ = started(folder, model="ifam_vit_tiny_patch16_224", backbone=small, size=96)
    source, state = load_file(folder / "model.safetensors"), model.state_dict()
    assert state["backbone.pos_embed"].shape[1] == 37 and source["pos_embed"].shape[1] == 17
    assert torch.equal(state["backbone.blocks.3.attn.qkv.weight"], source["blocks.3.attn.qkv.weight"])
    assert torch.equal(state["heads.fg.weight"], source["head.weight"])
    assert not torch.equal(state["heads.full.weight"], source["head.weight"])
    assert started(folder)[0].view_spec.size == 64  # its own, where no other is given
    made = tmp_path / "ifam"
    hub.save_checkpoint(model, made, CLASSES)
    again = started(made, num_parts=8)[0].state_dict()
    assert all(torch.equal(again[k], v) for k, v in state.items())
    fewer = started(made, num_parts=3)[0].state_dict()
    back = started(made, model="l2r2_vit_tiny_patch16_224", backbone=small, size=96)[0].state_dict()
    assert all(torch.equal(back[f"heads.{b}.weight"], state["heads.fg.weight"]) for b in ("full", "fg"))  # never that for parts
    assert fewer["parts.prototypes"].shape[0] == 4 and torch.equal(fewer["heads.full.weight"], state["heads.full.weight"])


def test_a_run_starts_from_another(dataset, run, tmp_path):
    out, arguments = tmp_path / "out", ["finetune", str(dataset), "--epochs", "1", "--lr", "1e-9", "--init"]
    call = CliRunner().invoke
    result = call(app, [*arguments, str(run), "-o", str(out)])
    assert result.exit_code == 0 and "its heads (full, fg)" in result.stderr, result.output
    before, after = (load_file(folder / "model.safetensors") for folder in (run, out))
    assert torch.allclose(after["backbone.conv1.0.weight"], before["backbone.conv1.0.weight"], atol=1e-6)
    training = hub.load_checkpoint(out).training
    assert training["init"]["name"] == training["recipe"]["init"] == run.name  # no folder of this machine
    result = call(app, [*arguments, str(run), "-o", str(out)])
    assert result.exit_code == 0 and "already finished" in result.stdout
    result = call(app, [*arguments, str(write_run(tmp_path / "other", seed=3)), "-o", str(out)])
    assert isinstance(result.exception, L2R2Error) and "a run with a different init" in str(result.exception)


def test_a_start_whose_weights_changed_is_another_run(dataset, tmp_path):
    made, out = write_run(tmp_path / "made"), tmp_path / "out"
    recipe = Recipe.read("finetune", {"init": str(made), "epochs": 1})
    finetune(dataset, recipe, out)
    shutil.rmtree(made)
    write_run(made, seed=5)
    with pytest.raises(L2R2Error, match="a different init"):
        finetune(dataset, recipe, out)


def test_a_head_goes_with_the_backbone_that_it_was_trained_on(tmp_path):
    made = write_run(tmp_path / "two", branches=("full", "fg"), shared=False)
    weights = load_file(made / "model.safetensors")

    def heads(**keys):
        model, said = started(made, **keys)
        return model.state_dict(), said

    state, said = heads(branches=["fg"])  # the first branch's backbone is the shared one; here it is fg's
    assert torch.equal(state["backbone.conv1.0.weight"], weights["branch_backbones.fg.conv1.0.weight"])
    assert torch.equal(state["heads.fg.weight"], weights["heads.fg.weight"]) and said.endswith("its heads (fg)")
    state, _ = heads(branches=["fg", "full"])
    assert torch.equal(state["branch_backbones.full.conv1.0.weight"], weights["backbone.conv1.0.weight"])
    assert torch.equal(state["heads.full.weight"], weights["heads.full.weight"])
    state, _ = heads(shared=True)  # full's backbone, so full's head for both
    assert all(torch.equal(state[f"heads.{b}.weight"], weights["heads.full.weight"]) for b in ("full", "fg"))
    alone = write_run(tmp_path / "alone", branches=("fg",))
    state = started(alone, branches=["full", "fg"])[0].state_dict()
    weights = load_file(alone / "model.safetensors")
    assert all(torch.equal(state[f"heads.{b}.weight"], weights["heads.fg.weight"]) for b in ("full", "fg"))


def test_a_convolution_that_classifies_and_two_classifiers(tmp_path):
    folder = plain(tmp_path / "conv", CLASSES, "resnetv2_18")
    state, source = started(folder)[0].state_dict(), load_file(folder / "model.safetensors")
    assert torch.equal(state["heads.fg.weight"], source["head.fc.weight"].flatten(1))
    assert torch.equal(state["heads.fg.bias"], source["head.fc.bias"])
    two = plain(tmp_path / "two", CLASSES, "deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    assert started(two)[1].endswith("new heads: full, fg")


def test_dropout_of_the_old_run_shows_in_the_recipe(tmp_path):
    made = write_run(tmp_path / "run", drop_rate=0.3, drop_path_rate=0.2)
    recipe = Recipe.read("finetune", {"init": str(made)})
    assert (recipe.drop, recipe.drop_path, recipe.backbone) == (0.3, 0.2, None)
    assert Recipe.read("finetune", {"init": str(made), "drop": 0}).drop == 0


def test_validation_rows_that_the_start_was_trained_on_are_named(dataset, tmp_path):
    first = Recipe.read("scratch", {"model": "timm:resnet10t", "size": 32, "epochs": 1})
    finetune(dataset, first, tmp_path / "first", train_split="val", val_split="test")
    result = finetune(dataset, Recipe.read("finetune", {"init": str(tmp_path / "first"), "epochs": 1}), tmp_path / "second")
    assert any("12 of 12 validation images were trained on by" in note for note in result.notes)
    assert "12 of the 12 images of val were trained on" in evaluate_run(tmp_path / "second", dataset, "val").warnings[0]
    third = finetune(dataset, Recipe.read("finetune", {"init": str(tmp_path / "second"), "epochs": 1}), tmp_path / "third")
    assert any("12 of 12 validation images" in note for note in third.notes)


def test_a_run_cannot_overwrite_what_it_starts_from(dataset, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    recipe = Recipe.read("finetune", {"init": str(out), "epochs": 1})
    with pytest.raises(L2R2Error, match="contains the checkpoint to start from"):
        finetune(dataset, recipe, out, overwrite=True)
    assert (out / "model.safetensors").exists()


def test_a_fusion_fitted_later_is_the_same_start(run, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(run, made)
    before = InitCheckpoint.read(str(made)).about()
    checkpoint = hub.load_checkpoint(made)
    checkpoint.model.fusion = create_fusion({"name": "scaled_average"}, 2, 3)
    hub.save_checkpoint(checkpoint.model, made, CLASSES)
    assert InitCheckpoint.read(str(made)).about() == before


def test_the_card_knows_where_it_came_from(tmp_path):
    made = write_run(tmp_path / "nc")
    config = json.loads((made / "config.json").read_text())
    config["l2r2"]["training"] = {"derived_from": "timm:convnextv2_tiny.fcmae_ft_in22k_in1k"}
    config["pretrained_cfg"].pop("license", None)
    (made / "config.json").write_text(json.dumps(config))
    about = InitCheckpoint.read(str(made)).about()
    assert source_of_training({"init": about, "recipe": {"pretrained": True, "model": "l2r2_resnet18"}}).license == "cc-by-nc-4.0"
    config["pretrained_cfg"]["license"], config["l2r2"]["training"] = "cc-by-sa-4.0", {}  # as it was published, then fetched
    (made / "config.json").write_text(json.dumps(config))
    assert InitCheckpoint.read(str(made)).about()["source"] == {"name": "nc", "hub_id": None, "license": "cc-by-sa-4.0"}
    assert source_of_training({"init": {"source": {"name": 3}}}).name is None


ODD = [{"pretrained_cfg": None}, {"model_args": []}, {"label_names": 3}, {"pretrained_cfg": {"mean": 1}}]


@pytest.mark.parametrize("change", ODD)
def test_odd_configs(tmp_path, change):
    folder = plain(tmp_path / "plain", CLASSES)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(L2R2Error, match=r"config\.json"):
        started(folder)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pretrained": False}, "use one or the other"),
        ({"model": "timm:resnet18"}, "the weights of l2r2 do not fit resnet18"),
        ({"model": "timm:test_convnext"}, "the weights of l2r2 do not fit test_convnext"),
        ({"model": "timm:test_vit"}, "the weights of l2r2 do not fit test_vit"),
        ({"init": "nowhere"}, "no such folder"),
        ({"init": 3}, "no such folder|must be text"),
    ],
)
def test_what_cannot_start(run, keys, said):
    with pytest.raises(L2R2Error, match=said):
        started(**{"init": run, **keys})


def test_damaged_and_pickled_starts(run, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(run, folder)
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(L2R2Error, match="its weights cannot be read"):
        started(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(L2R2Error, match="pickled weights are never loaded"):
        started(folder)

"""A training that starts from a vision-language model begins where the zero-shot model is, and gives a normal run."""

import json

import pytest
import torch
import vlm_cases
from conftest import write_dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

import l2r2_models
from l2r2_cli.commands import app
from l2r2_models import L2R2Error, Predictor, load_checkpoint
from l2r2_models.checkpoints.convert import join, split
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.evaluator import judge_run
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

SMALL = {"epochs": 1, "batch_size": 6, "fusion": "max_confidence"}
STILL = {**SMALL, "lr": 1e-15, "weight_decay": 0.0}  # a step too small for float32: the weights after it are those before


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("few") / "data", count=12, splits=("train", "val"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return vlm_cases.clip(tmp_path_factory.mktemp("clip") / "tiny")


def source(folder, data, more="", also=()):
    """Names the classes in another order than the data set."""
    names = folder.parent / f"names{len(also)}.json"
    names.write_text(json.dumps({label: f"a {label} one" for label in [*read_table(data).classes()[::-1], *also]}))
    return f"vlm:{folder}?names={names}{more}"


def train(model, data, out, **changes):
    return finetune(data, Recipe.read("finetune", {"model": model, **changes}), out)


def answers(model, data):
    """Label, score and reason of the prediction for each image, with its box and without."""
    predict = Predictor.from_pretrained(str(model))
    table = read_table(data)
    boxes = [*(row.entry.boxes for row in table.rows), *([] for _ in table.rows)]
    found = predict([row.path for row in table.rows] * 2, boxes=boxes)
    return [(f.objects[0].label, f.objects[0].source) for f in found], torch.tensor([f.objects[0].score for f in found])


@pytest.mark.parametrize("family", vlm_cases.MAKERS)
def test_before_the_first_step_the_run_predicts_what_the_zero_shot_model_predicts(family, data, tmp_path):
    model = source(vlm_cases.MAKERS[family](tmp_path / family), data)
    train(model, data, tmp_path / "run", **STILL)
    (ours, scores), (theirs, expected) = answers(tmp_path / "run", data), answers(model, data)
    assert ours == theirs and {source for _, source in ours} > {"full"}, "both branches answer"
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3, "the images differ"


@pytest.fixture(scope="module")
def run(clip, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
        train(source(clip, data), data, out, **{**SMALL, "epochs": 8, "lr": 3e-3})
    return out


def test_the_training_learns_and_the_run_is_like_any_other(run, clip, data):
    import timm

    record = json.loads((run / "run.json").read_text())
    judged = judge_run(run, data, "val", workers=0)
    before = judge_run(source(clip, data), data, "val", workers=0)
    accuracy = {name: judged.outputs[name].argmax(-1).eq(judged.data.labels).float().mean() for name in ("full", "fg")}
    assert accuracy["fg"] > 0.8 > before.outputs["fg"].argmax(-1).eq(before.data.labels).float().mean()
    assert record["metrics"]["fg_accuracy"] == pytest.approx(float(accuracy["fg"]), abs=1e-6)
    assert record["notes"][0].startswith("started from") and "prototypes of 3 classes" in record["notes"][0]
    model = load_checkpoint(run).model
    image = torch.rand(1, 3, 64, 64)
    alone = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    assert torch.equal(alone(image), model.forward_views(full=image).full)
    other = timm.create_model(f"local-dir:{run}", pretrained=True, num_classes=7).eval()
    assert other(image).shape == (1, 7) and torch.equal(other.backbone(image), alone.backbone(image))


def test_a_published_config_names_no_folder_of_this_machine(run, clip, data):
    config = json.loads((run / "config.json").read_text())
    training = config["l2r2"]["training"]
    assert training["recipe"]["model"] == f"vlm:{clip.name}" and training["init"]["source"]["name"] == clip.name
    assert str(clip.parent) not in (run / "config.json").read_text()
    assert config["model_args"]["backbone"].startswith("vit_") and config["model_args"]["prototype_dim"] == 24


def test_the_same_command_does_nothing_for_a_finished_run_and_another_model_is_refused(run, clip, data):
    again = train(source(clip, data), data, run, **{**SMALL, "epochs": 8, "lr": 3e-3})
    assert again.was_finished
    with pytest.raises(L2R2Error, match="--overwrite"):
        train(source(clip, data, "&template=the {}"), data, run, **{**SMALL, "epochs": 8, "lr": 3e-3})
    model = source(clip, data)
    names = clip.parent / "names0.json"
    names.write_text(names.read_text().replace("a red one", "a ruby one"))
    with pytest.raises(L2R2Error, match="a run with a different init"):
        train(model, data, run, **{**SMALL, "epochs": 8, "lr": 3e-3})


def test_a_run_starts_from_it_with_its_heads(run, data, tmp_path):
    """As DFR does."""
    recipe = Recipe.read("head_only", {"init": str(run), **STILL})
    result = finetune(data, recipe, tmp_path / "last")
    assert "its heads (full, fg)" in result.notes[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "last"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_independent_branches_start_alike_and_can_be_split_and_joined(clip, data, tmp_path):
    train(source(clip, data), data, tmp_path / "run", shared=False, **STILL)
    folders = split(tmp_path / "run", tmp_path / "parts")
    join(folders, tmp_path / "joined", fusion="max_confidence")
    (ours, scores), (theirs, expected) = answers(tmp_path / "joined", data), answers(source(clip, data), data)
    assert ours == theirs
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_views_of_another_size_get_resampled_position_embeddings(clip, data, tmp_path):
    train(source(clip, data), data, tmp_path / "run", size=96, **STILL)
    model = load_checkpoint(tmp_path / "run").model
    assert model.view_spec.size == 96 and model.backbone.pos_embed.shape == (1, 37, 32)


def test_heads_of_prototypes_are_a_recipe_key_for_any_backbone(data, tmp_path):
    recipe = Recipe.default("timm:resnet10t", False, prototype_dim=8, size=32, epochs=1)
    finetune(data, recipe, tmp_path / "run")
    assert load_file(tmp_path / "run" / "model.safetensors")["heads.fg.weight"].shape == (3, 8)
    assert load_checkpoint(tmp_path / "run").model(torch.rand(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ("&fusion=average", {}, "fusion is a key of the recipe when a model is trained; pass --set fusion=NAME"),
        ("&fg_mode=masked", {}, "fg_mode is a key of the recipe"),
        ("&margin=0.1", {}, "margin is a key of the recipe"),
        ("", {"init": "somewhere"}, "leave init out"),
        ("", {"pretrained": False}, "leave pretrained=false out"),
        ("", {"prototype_dim": 8}, "leave prototype_dim out"),
        ("", {"num_parts": 3}, "num_parts is for iFAM models"),
    ],
)
def test_settings_that_do_not_fit_are_refused(clip, data, tmp_path, more, changes, message):
    with pytest.raises(L2R2Error, match=message):
        train(source(clip, data, more), data, tmp_path / "run", **SMALL, **changes)
    assert not (tmp_path / "run").exists()


def test_every_class_needs_a_name(clip, data, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue")
    with pytest.raises(L2R2Error, match='has no name for the class "green" of the data set'):
        train(f"vlm:{clip}?names={tmp_path / 'names.txt'}", data, tmp_path / "run", **SMALL)


def test_names_of_more_classes_than_the_data_set_has_are_left_out(clip, data, tmp_path):
    train(source(clip, data, also=["other"]), data, tmp_path / "run", **STILL)
    assert answers(tmp_path / "run", data)[0] == answers(source(clip, data), data)[0]


def test_a_tower_that_is_no_network_of_timm_is_refused(data, tmp_path):
    model = source(vlm_cases.open_clip(tmp_path / "resnet", vision=vlm_cases.RESNET), data)
    assert load_checkpoint(model).labels, "it classifies"
    with pytest.raises(L2R2Error, match="its image tower is not a network of timm, so it can classify but not be trained"):
        train(model, data, tmp_path / "run", **SMALL)


def test_a_tower_that_would_compute_something_else_is_refused(clip, data, tmp_path, monkeypatch):
    from l2r2_models.zero_shot import timm_tower

    monkeypatch.setitem(timm_tower.ACTIVATIONS, "quick_gelu", "gelu")  # a difference that no shape shows
    with pytest.raises(L2R2Error, match="is not a network of timm"):
        train(source(clip, data), data, tmp_path / "run", **SMALL)


def test_the_command_takes_the_model(clip, data, tmp_path):
    options = ["--epochs", "1", "--batch-size", "6", "--json", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["finetune", str(data), "--model", source(clip, data), *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 12
    assert l2r2_models.Predictor.from_pretrained(str(tmp_path / "run")).labels == read_table(data).classes()

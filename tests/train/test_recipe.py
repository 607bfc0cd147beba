"""Recipes: built-in ones, files, overrides, and the messages for mistakes."""

import pytest

from l2r2_models import L2R2Error
from l2r2_models.io import parse_settings
from l2r2_models.train.recipe import Recipe
from l2r2_models.train.recipe_keys import builtin_recipes


def test_every_built_in_recipe_is_complete_but_for_the_model():
    assert builtin_recipes() == ("few_images", "finetune", "head_only", "scratch")
    recipes = {name: Recipe.read(name, {"model": "timm:resnet10t"}) for name in builtin_recipes()}
    assert [recipes[name].pretrained for name in builtin_recipes()] == [True, True, True, False]
    assert (
        recipes["head_only"].trainable == "head"
        and recipes["few_images"].frozen_stride == 16
        and recipes["scratch"].lr > recipes["finetune"].lr
    )
    with pytest.raises(L2R2Error, match="no model is set; pass --model"):
        Recipe.read("finetune")


def test_a_saved_recipe_reads_back_as_itself_and_changes_override_it(tmp_path):
    recipe = Recipe.default("timm:resnet10t", False, branches=("full",), ema=0.99, val_fraction=0.2, val_group="site")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe == Recipe.from_dict(recipe.to_dict())
    assert Recipe.read(tmp_path / "recipe.yaml", {"lr": 0.5}).lr == 0.5


def test_settings_are_yaml_and_numbers_may_be_written_as_people_write_them():
    values = parse_settings(["lr=1e-3", "branches=[full, bg]", "balanced=true", "val_group=a=b", "size=null", "epochs=3.0"])
    recipe = Recipe.read("scratch", {"model": "m", "val_fraction": 0.1, **values})
    assert (recipe.lr, recipe.branches, recipe.balanced, recipe.size, recipe.epochs) == (1e-3, ("full", "bg"), True, None, 3)
    assert recipe.val_group == "a=b" and type(recipe.epochs) is int


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1}, 'Unknown recipe key "learning_rate"'),
        ({"epoch": 1}, 'Unknown recipe key "epoch"; close matches: epochs'),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"balanced": 1}, "balanced must be true or false, got 1"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"branches": {"full": 1}}, "branches must be a list of names"),
        ({"optimizer": None}, "optimizer must be text, got None"),
        ({"frozen_stride": 3}, 'Unknown frozen_stride "3"; choose from 0, 2, 4'),
        ({"frozen_stride": 4}, "frozen_stride keeps pretrained weights, but pretrained is false"),
        ({"ema": 1}, "ema must be at least 0 and below 1"),
        ({"layer_decay": 0}, "layer_decay must be above 0"),
        ({"precision": "int8"}, 'Unknown precision "int8"; choose from auto, fp32, bf16, fp16'),
        ({"trainable": "neck"}, 'Unknown trainable "neck"; choose from all, head'),
        ({"best_metric": "loss"}, 'Unknown best_metric "loss"; choose from none, fused_accuracy'),
        ({"best_metric": "bg_accuracy"}, "needs the branch bg; this model has full, fg"),
        ({"patience": 3}, "set best_metric too"),
        ({"grad_accumulation": 64}, "is larger than batch_size 32"),
    ],
)
def test_slips_are_sentences(changes, message):
    with pytest.raises(L2R2Error, match=message):
        Recipe.read("scratch", {"model": "timm:resnet10t", **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "must be a YAML mapping"),
        ("a: [", "is not valid YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "is not valid YAML"),  # nothing in a recipe is ever run
        (b"\xff\xfe\x00", "cannot be read .*; pass a YAML file or one of"),
        ("a: &x [1, 2]\nb: *x", "aliases .* are not supported"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_files_that_are_no_recipe_are_sentences(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(L2R2Error, match=message):
        Recipe.read(file, {"model": "m"})
    with pytest.raises(L2R2Error, match="pass a YAML file or one of few_images, finetune, head_only, scratch"):
        Recipe.read("fintune", {"model": "m"})


@pytest.mark.parametrize(
    ("setting", "message"), [("lr", "takes key=value"), ("=1", "takes key=value"), ("a=[", "is not valid YAML")]
)
def test_settings_that_are_none_are_sentences(setting, message):
    with pytest.raises(L2R2Error, match=message):
        parse_settings([setting])
    with pytest.raises(L2R2Error, match="--set lr is given twice"):
        parse_settings(["lr=1", "lr=2"])

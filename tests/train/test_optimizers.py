"""timm's optimizers as a recipe selects them."""

import pytest
import torch

from l2r2_models import L2R2Error
from l2r2_models.train.models import create_model
from l2r2_models.train.optimizers import create_optimizer
from l2r2_models.train.recipe import Recipe


def made(backbone="test_vit", **changes):
    recipe = Recipe.default(f"timm:{backbone}", False, size=32, **changes)
    model = create_model(recipe, 3)
    return model, create_optimizer(model, recipe)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "muon", "nadamw", "adafactor", "lookahead_radam"])
def test_any_optimizer_of_timm_takes_a_step(name):
    model, optimizer = made(optimizer=name)
    before = model.heads["fg"].weight.detach().clone()
    full, fg = torch.randn(2, 2, 3, 32, 32)
    sum(z.square().sum() for z in model.forward_branches(full=full, fg=fg).values()).backward()
    optimizer.step()
    assert not torch.equal(before, model.heads["fg"].weight)


def test_an_unknown_one_names_close_ones():
    with pytest.raises(L2R2Error, match=r'Unknown optimizer "adamv"; close names: .*adamw'):
        made(optimizer="adamv")


def test_norms_biases_and_what_the_backbone_names_do_not_decay():
    model, optimizer = made(weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decays) == len(names)
    free = {name for name, p in names.items() if decays[id(p)] == 0}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.norm.weight", "heads.full.bias"} <= free
    assert {decays[id(p)] for name, p in names.items() if name not in free} == {0.1}
    assert all(p.ndim > 1 for name, p in names.items() if name not in free)


@pytest.mark.parametrize("shared", [True, False])
def test_layer_decay_slows_early_layers_and_leaves_the_heads(shared):
    model, optimizer = made(layer_decay=0.5, lr=1.0, shared=shared)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    for prefix in model.backbone_prefixes():
        layers = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight")
        patches, first, last = (rates[id(names[prefix + layer])] for layer in layers)
        assert patches == first / 2 and first < last <= 1.0
    assert rates[id(names["heads.full.weight"])] == rates[id(names["heads.fg.weight"])] == 1.0

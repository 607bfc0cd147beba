"""The training loss: correct for each branch with mixing, and independent of how the batch is split."""

import re

import pytest
import torch

from l2r2_models import L2R2Error
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.mixup import ViewMixup
from l2r2_models.train.models import create_model, frozen_parts
from l2r2_models.train.optimizers import create_optimizer
from l2r2_models.train.recipe import Recipe

CLASSES = 5


def model_of(backbone="resnet10t", **changes):
    return create_model(Recipe.default(f"timm:{backbone}", False, size=32, **changes), CLASSES)


def label_views(labels, size=8):
    """Views whose pixels are their own one-hot label, so that a mixed view shows which shares it was mixed of."""
    return torch.nn.functional.one_hot(labels, CLASSES).float()[:, :, None, None].expand(-1, -1, size, size).clone()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_the_shares_that_the_views_are_mixed_of(mixup, cutmix):
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (12,))
    rows = torch.arange(12) % 3 > 0
    views, mix, changed = label_views(labels), ViewMixup(CLASSES, mixup, cutmix), 0
    for _ in range(20):
        mixed, targets = mix(views, labels, rows)
        assert torch.allclose(mixed.mean((2, 3)), targets, atol=1e-6)  # shares by area or by blending
        assert torch.equal(mixed[~rows], views[~rows]), "rows that do not count for the branch are left alone"
        others = set(labels[rows].tolist())
        assert all(set(t.nonzero()[:, 0].tolist()) <= others for t in targets[rows]), "no row without an object is mixed in"
        changed += not torch.equal(mixed, views)
    assert changed > 15  # cutmix can draw an empty box
    assert torch.equal(views, label_views(labels)), "the caller's views are not written to"


def test_mixing_happens_with_its_probability_and_never_in_evaluation():
    torch.manual_seed(0)
    labels = torch.arange(4)
    views, rows = label_views(labels), torch.ones(4, dtype=torch.bool)
    mix = ViewMixup(CLASSES, 1.0, 0.0, probability=0.5)
    assert 20 < sum(not torch.equal(mix(views, labels, rows)[0], views) for _ in range(80)) < 60
    assert torch.equal(ViewMixup(CLASSES, 1.0, 0.0)(views, labels, rows & (labels == 0))[0], views), "one row has no partner"
    loss = BranchLoss(model_of(), mix=ViewMixup(CLASSES, 1.0, 1.0)).eval()
    plain = BranchLoss(loss.model).eval()
    batch = dict(labels=labels, has_fg=rows, full=torch.randn(4, 3, 32, 32), fg=torch.randn(4, 3, 32, 32))
    assert torch.equal(loss(**batch)["loss"], plain(**batch)["loss"])


def test_branches_are_mixed_with_draws_of_their_own():
    torch.manual_seed(0)
    loss = BranchLoss(model_of(), mix=ViewMixup(CLASSES, 1.0, 0.0))
    seen = []
    loss.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    view = torch.randn(4, 3, 32, 32)
    loss.train()(labels=torch.arange(4), has_fg=torch.ones(4, dtype=torch.bool), full=view, fg=view)
    full, fg = seen[0].split(4)
    assert not torch.allclose(full, fg)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_of_a_batch_add_up_to_the_whole(smoothing):
    torch.manual_seed(0)
    loss = BranchLoss(model_of("test_vit"), smoothing).train()
    has_fg = torch.tensor([True, False, False, True, True, True, False])
    batch = dict(labels=torch.arange(7) % CLASSES, has_fg=has_fg, full=torch.randn(7, 3, 32, 32), fg=torch.randn(7, 3, 32, 32))
    whole = loss(**batch)["loss"]
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 3), slice(3, 7))]
    assert torch.allclose(sum(loss(**part, counts=torch.tensor([7.0, 4.0]))["loss"] for part in parts), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "changes", "trained"),
    [
        ("resnet10t", {"trainable": "head"}, {"heads"}),
        ("resnet10t", {"frozen_stride": 8}, {"heads", "layer3", "layer4"}),
        ("test_convnext", {"frozen_stride": 4}, {"heads", "stages.1", "stages.2", "stages.3", "head"}),
        ("tf_efficientnet_lite0", {"frozen_stride": 8}, {"heads", *(f"blocks.{i}" for i in (3, 4, 5, 6)), "conv_head", "bn2"}),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_frozen_keeps_its_weights_and_statistics(backbone, changes, trained, shared):
    model = model_of(backbone, shared=shared)
    recipe = Recipe.default(f"timm:{backbone}", True, optimizer="sgd", lr=0.1, weight_decay=0.1, **changes)
    loss = BranchLoss(model, frozen=frozen_parts(model, recipe)).train()
    before = {k: v.clone() for k, v in loss.model.state_dict().items()}
    optimizer = create_optimizer(loss.model, recipe)
    views = torch.randn(2, 4, 3, 64, 64)
    loss(torch.arange(4), torch.ones(4, dtype=torch.bool), full=views[0], fg=views[1])["loss"].backward()
    optimizer.step()
    changed = {k for k, v in loss.model.state_dict().items() if not torch.equal(v, before[k])}
    names = {re.sub(r"^(backbone|branch_backbones.\w+)\.", "", name) for name in changed}
    assert {re.match(r"(blocks|stages)\.\d+|\w+", name).group() for name in names} == trained
    assert shared or any(name.startswith("branch_backbones") for name in changed) == (trained != {"heads"})


def test_a_network_of_one_stride_has_no_early_stages():
    model = model_of("test_vit")
    for stride in (4, 16):
        with pytest.raises(L2R2Error, match=f"frozen_stride {stride} freezes nothing"):
            frozen_parts(model, Recipe.default("timm:test_vit", True, frozen_stride=stride))


def test_channels_last_and_grad_checkpointing_change_nothing_but_rounding():
    views, labels, has_fg = torch.randn(2, 4, 3, 32, 32), torch.arange(4), torch.ones(4, dtype=torch.bool)
    gradients = []
    for changes in ({}, {"channels_last": True}, {"grad_checkpointing": True}):
        recipe = Recipe.default("timm:resnet10t", False, size=32, **changes)
        loss = BranchLoss(create_model(recipe, CLASSES), channels_last=recipe.channels_last).train()
        loss(labels, has_fg, full=views[0], fg=views[1])["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loss.parameters()]))
    for other in gradients[1:]:
        assert torch.allclose(other, gradients[0], rtol=1e-3, atol=1e-5)
    assert any(
        p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in BranchLoss(model_of(), channels_last=True).parameters()
    )


def test_arguments_of_the_backbone_replace_none_of_the_model():
    with pytest.raises(L2R2Error, match="num_classes is not an argument of the timm backbone"):
        create_model(Recipe.default("timm:test_vit", False, size=32, backbone={"num_classes": 7}), CLASSES)

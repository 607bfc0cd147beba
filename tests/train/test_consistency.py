"""Consistency on two backgrounds: closed forms, gradients, and the rows that count."""

import math
from dataclasses import replace

import pytest
import torch

from l2r2_models import L2R2Error, ViewSpec
from l2r2_models.boxes import BoxEntry
from l2r2_models.data.augment import Augment
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.table import read_table
from l2r2_models.train.consistency import jensen_shannon
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe


def recipe(model="timm:test_vit", **changes):
    return Recipe.default(model, False, **{"size": 32, **changes})


def test_two_rows_by_hand():
    p, q = [(0.5, 0.5), (0.9, 0.1)], [(0.8, 0.2), (0.9, 0.1)]
    first, second = (torch.tensor(rows).log() + 3 for rows in (p, q))  # a constant changes no softmax
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))  # noqa: E731
    mean = (0.65, 0.35)
    expected = [(kl(p[0], mean) + kl(q[0], mean)) / 2, 0.0]
    assert jensen_shannon(first, second).tolist() == pytest.approx(expected, abs=1e-6)
    assert jensen_shannon(second, first).tolist() == pytest.approx(expected, abs=1e-6)


def test_certain_predictions_have_finite_divergences_and_gradients():
    first, second = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1e4, 0.0]], requires_grad=True)
    assert jensen_shannon(first, second).item() == pytest.approx(math.log(2))
    jensen_shannon(first, second).sum().backward()
    assert first.grad.isfinite().all() and second.grad.isfinite().all()


@pytest.fixture(scope="module")
def batch():
    """Seven rows, three without an object; of the others, one was not pasted onto another background."""
    torch.manual_seed(0)
    rows = dict(labels=torch.arange(7) % 3, has_fg=torch.tensor([True, False, False, True, True, True, False]))
    rows["swapped"] = torch.tensor([True, False, True, True, False, True, False])
    return rows | {name: torch.randn(7, 3, 32, 32) for name in ("full", "fg", "swapped_full", "swapped_fg")}


@pytest.fixture(scope="module")
def model():
    return create_model(recipe(), 3)


def loss_of(model, batch, counts=None, **weights):
    return BranchLoss(model, **weights).train()(**batch, counts=counts)["loss"]


def test_consistency_adds_the_divergence_of_both_branches_over_the_rows_that_were_pasted(model, batch):
    one = model.forward_views(full=batch["full"], fg=batch["fg"])
    other = model.forward_views(full=batch["swapped_full"], fg=batch["swapped_fg"])
    counted = batch["swapped"] & batch["has_fg"]
    each = jensen_shannon(one.full, other.full) + jensen_shannon(one.fg, other.fg)
    expected = each[counted].sum() / batch["has_fg"].sum()
    assert expected > 1e-3
    added = loss_of(model, batch, consistency=2.0) - loss_of(model, batch)
    assert added.item() == pytest.approx(2 * expected.item(), rel=1e-3)
    only_full = {name: value for name, value in batch.items() if name != "swapped_fg"}
    expected = jensen_shannon(one.full, other.full)[counted].sum() / batch["has_fg"].sum()
    assert (loss_of(model, only_full, consistency=1.0) - loss_of(model, batch)).item() == pytest.approx(expected.item(), rel=1e-3)


def test_it_does_not_count_in_evaluation(model, batch):
    plain, both = (BranchLoss(model, **weights).eval() for weights in ({}, {"consistency": 1.0}))
    assert torch.equal(plain(**batch)["loss"], both(**batch)["loss"])


def test_parts_of_a_batch_add_up_to_the_whole(model, batch):
    weights = {"consistency": 2.0}
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 3), slice(3, 7))]
    counts = torch.tensor([7.0, 4.0])
    added = sum(loss_of(model, part, counts, **weights) for part in parts)
    assert torch.allclose(added, loss_of(model, batch, **weights), atol=1e-5)


# ---- the second view ----


def items_of(table, augment=None, views=("full", "fg"), **options):
    spec = ViewSpec(size=40, mean=(0.0,) * 3, std=(1.0,) * 3)
    return ViewDataset(table, table.classes(), spec, ("full", "fg"), swapped_views=views, augment=augment, **options)


@pytest.mark.parametrize("augment", [None, Augment(color=0.0, box_jitter=0.0, scale=0.5)], ids=["plain", "augmented"])
@pytest.mark.parametrize("swap", [0.0, 1.0])
def test_the_second_view_shows_the_same_object_on_another_background(dataset, augment, swap):
    table = read_table(dataset).of_split("train")
    options = {"augment": augment, "background_swap": swap}
    two, one = items_of(table, **options), items_of(table, views=(), **options)
    moved = 0
    for i in range(len(table)):
        item, plain = two[i], one[i]
        assert item.keys() - plain.keys() == {"swapped", "swapped_full", "swapped_fg"} and item["swapped"]
        assert all(torch.equal(torch.as_tensor(item[name]), torch.as_tensor(plain[name])) for name in plain)
        assert torch.equal(item["swapped_fg"], item["fg"]), "a crop to the box is unchanged: only what lies around it is new"
        moved += not torch.allclose(item["swapped_full"], item["full"], atol=0.05)
    assert moved > 0.8 * len(table)


def test_a_row_without_an_object_has_no_second_background(dataset):
    table = read_table(dataset).of_split("train")
    bare = replace(table, rows=(replace(table.rows[0], entry=BoxEntry()), *table.rows[1:]))
    item = items_of(bare)[0]
    assert not item["swapped"] and torch.equal(item["swapped_full"], item["full"])
    assert "swapped" not in items_of(bare).without_augmentation()[0]


def test_a_second_background_needs_two_images_with_an_object(dataset):
    table = read_table(dataset).of_split("train")
    rows = tuple(replace(row, entry=row.entry if i == 0 else None) for i, row in enumerate(table.rows))
    with pytest.raises(L2R2Error, match="needs at least two images"):
        items_of(replace(table, rows=rows))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"consistency": float("inf")}, "consistency must be at least 0"),
        ({"consistency": 1, "cutmix": 0.2}, "into each view that consistency compares"),
        ({"consistency": 1, "branches": ("fg", "bg"), "fg_mode": "masked_crop"}, "full or an fg that is a crop"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(L2R2Error, match=sentence):
        create_model(recipe(**changes), 3)

"""Fusions that weigh the context by its agreement with fg: the limits of e, and the fitted parameters."""

import pytest
import torch

from l2r2_models.errors import L2R2Error
from l2r2_models.fusion import create_fusion

NAMES = ("agreement", "two_worlds")
CLASSES = 6


def draw(rows=400, away=0.5, subtract=False, seed=0):
    """fg right in most rows; a context that names the class at home, and away any class (or, to subtract, any other)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    shift = torch.randint(1 if subtract else 0, CLASSES, (rows,), generator=generator)
    moved = torch.arange(rows) < away * rows
    said = torch.where(moved, (labels + shift) % CLASSES, labels)
    noise = torch.randn(2, rows, CLASSES, generator=generator)
    return 2 * torch.eye(CLASSES)[labels] + noise[0], (3 * torch.eye(CLASSES)[said] + noise[1])[None], labels, moved


def fitted(name, **options):
    fg, context, labels, away = draw(**options)
    fusion = create_fusion(name, 2, CLASSES)
    fusion.set_prior(torch.arange(1.0, CLASSES + 1))
    fusion.fit(fg, context, labels, None, away)
    return fusion


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [1, 2])
def test_where_no_background_misleads_it_is_the_product_of_experts_and_where_all_do_it_is_fg(name, context):
    fg, full, _, _ = draw()
    others = torch.cat([full, full.flip(-1)])[:context]
    fusion = create_fusion({"name": name, "misled": 0}, 1 + context, CLASSES)
    fusion.set_prior(torch.arange(1.0, CLASSES + 1))
    f, c = fg.softmax(-1), others.mean(0).softmax(-1)
    product = f * c / fusion.prior
    assert torch.allclose(fusion(fg, others).exp(), product / product.sum(-1, keepdim=True), atol=1e-5)
    fusion = create_fusion({"name": name, "misled": 1}, 1 + context, CLASSES)
    assert torch.allclose(fusion(fg, others).exp(), f, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_come_out_and_the_gradient_is_finite_at_both_ends(name):
    for misled in (0.0, 0.3, 1.0):
        fusion = create_fusion({"name": name, "misled": misled}, 2, CLASSES)
        fg = (200 * torch.randn(50, CLASSES)).requires_grad_()
        context = (200 * torch.randn(1, 50, CLASSES)).requires_grad_()
        out = fusion(fg, context)
        assert torch.allclose(out.logsumexp(-1), torch.zeros(50), atol=1e-4)
        out.max(-1).values.sum().backward()
        assert fg.grad.isfinite().all() and context.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_order_of_classes_nor_that_of_images_matters(name):
    fusion = fitted(name)
    fg, context, _, _ = draw(seed=1)
    rows, classes = torch.randperm(400), torch.randperm(CLASSES)
    out = fusion(fg, context)
    assert torch.equal(fusion(fg[rows], context[:, rows]), out[rows])
    moved = create_fusion(name, 2, CLASSES)
    moved.set_prior(torch.arange(1.0, CLASSES + 1)[classes])
    fg_train, context_train, labels_train, away_train = draw()
    moved.fit(fg_train[:, classes], context_train[:, :, classes], classes.argsort()[labels_train], None, away_train)
    assert torch.allclose(moved(fg[:, classes], context[:, :, classes]), out[:, classes], atol=1e-4)


def test_one_is_the_other_with_nothing_to_subtract():
    fg, context, _, _ = draw()
    one, other = (create_fusion({"name": name, "misled": 0.3}, 2, CLASSES) for name in NAMES)
    assert torch.allclose(one(fg, context), other(fg, context), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_it_gains_at_home_and_keeps_most_of_fg_away(name):
    """The point of it: one rule for both, where the average is good at home alone."""
    fusion = fitted(name, rows=2000)
    right = lambda z, labels: float((z.argmax(-1) == labels).double().mean())  # noqa: E731
    home, away = draw(2000, 0.0, seed=1), draw(2000, 1.0, seed=1)
    assert right(fusion(*home[:2]), home[2]) > right(home[0], home[2]) + 0.05
    average = create_fusion("average", 2, CLASSES)
    assert right(fusion(*away[:2]), away[2]) > right(average(*away[:2]), away[2]) + 0.05
    assert right(fusion(*away[:2]), away[2]) > right(away[0], away[2]) - 0.1


def test_background_evidence_is_removed_only_against_the_class():
    assert fitted("two_worlds", rows=2000, subtract=True).subtract > 0
    assert fitted("two_worlds", rows=2000).subtract == 0  # independent of the class: there is nothing to subtract


def test_context_that_does_not_help_at_home_is_left_out():
    """As with a weak full branch beside an fg that is always right: the product would only be surer, and sometimes wrong."""
    fg, context, labels, away = draw(400)
    sure = 8 * torch.nn.functional.one_hot(labels, CLASSES).to(fg)
    fusion = create_fusion("two_worlds", 2, CLASSES)
    fusion.set_prior(torch.ones(CLASSES))
    fusion.fit(sure, context, labels, None, away)
    assert fusion.trust == 0 and fitted("two_worlds", rows=2000).trust == 1
    fusion.subtract.zero_()
    assert torch.equal(fusion(sure, context).argmax(-1), sure.argmax(-1))
    assert torch.allclose(fusion.mixed(fg, context, torch.tensor(0.0)), (fg / fusion.temperatures[0]).log_softmax(-1), atol=1e-5)


def test_context_that_corrects_a_single_row_at_home_is_used():
    """Few held-out objects cannot prove a gain; at home the context has been right, and elsewhere the evidence turns it off."""
    fg, context, labels, away = draw(400)
    fg = 8 * torch.nn.functional.one_hot(labels, CLASSES).to(fg)
    context = 6 * torch.nn.functional.one_hot(labels, CLASSES).to(fg)[None]
    context[0, away] = context[0, away].roll(1, 0)
    wrong = 300  # a row with its usual background
    fg[wrong] = fg[wrong].roll(1) / 8
    fusion = create_fusion("two_worlds", 2, CLASSES)
    fusion.fit(fg, context, labels, None, away)
    assert fusion.trust == 1


def test_the_evidence_is_calibrated_on_rows_of_both_kinds():
    """The odds that the fitted numbers give for home are those at which rows are at home."""
    fusion = fitted("two_worlds", rows=4000)
    fg, context, _, away = draw(4000, seed=1)
    home = fusion.evidence(fg, context).sigmoid()
    assert abs(float(home.mean()) - 0.5) < 0.03
    sure = home > home.median()
    assert abs(float(home[sure].mean() - (~away)[sure].double().mean())) < 0.05


def test_without_swapped_rows_the_rule_stays_the_fixed_one():
    fg, context, labels, _ = draw()
    fusion = create_fusion("two_worlds", 2, CLASSES)
    fusion.fit(fg, context, labels)
    assert fusion.subtract == 0 and fusion.scale.tolist() == [0, 1] and fusion.misled == 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-0.1, 1.1, True, "half"])
def test_a_share_out_of_range_is_a_sentence(name, value):
    with pytest.raises(L2R2Error, match="a fraction of misleading backgrounds between 0 and 1"):
        create_fusion({"name": name, "misled": value}, 2, CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_scripted_and_exported_models_give_the_same_output(name):
    fusion = fitted(name).eval()
    fg, context, _, _ = draw(20, seed=2)
    assert torch.allclose(torch.jit.script(fusion)(fg, context), fusion(fg, context), atol=1e-6)
    program = torch.export.export(fusion, (fg, context))
    assert torch.allclose(program.module()(fg, context), fusion(fg, context), atol=1e-6)

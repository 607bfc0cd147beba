"""Fusing images taken at the same place jointly: the fraction of misleading backgrounds is estimated without labels."""

import pytest
import torch
from test_agreement import CLASSES, draw

from l2r2_models.errors import L2R2Error
from l2r2_models.fusion import create_fusion, fit_batch, fuse_branches, fuse_groups


def known(name="robust", rows=2000):
    """A fusion with a batch rule, fitted on rows of both kinds."""
    fg, context, labels, away = draw(rows)
    fusion = create_fusion(name, ("fg", "full"), CLASSES)
    logits = {"fg": fg, "full": context[0]}
    fusion.batch = fit_batch(fusion, logits, labels, torch.ones(rows), away, labels.bincount(minlength=CLASSES))
    return fusion


def place(rows=300, away=0.5, subtract=False, seed=1):
    fg, context, labels, _ = draw(rows, away, subtract, seed)
    return {"fg": fg, "full": context[0]}, torch.ones(rows, dtype=torch.bool), labels


def right(z, labels):
    return float((z.argmax(-1) == labels).double().mean())


def test_the_interval_contains_the_true_share_as_often_as_it_claims_however_few_the_rows():
    """95 % is claimed; 60 places, each with its own few held-out rows, so their uncertainty counts too."""
    inside, widths = 0, {}
    for seed in range(60):
        rows, share = (40, 400)[seed % 2], (seed % 5) / 4
        fg, context, labels, away = draw(rows, seed=seed)
        fusion = create_fusion("average", ("fg", "full"), CLASSES)
        logits = {"fg": fg, "full": context[0]}
        fusion.batch = fit_batch(fusion, logits, labels, torch.ones(rows), away, labels.bincount(minlength=CLASSES))
        logits, has_fg, _ = place(60, share, seed=1000 + seed)
        found = fuse_groups(fusion, logits, has_fg, ["a"] * 60).shares["a"]
        inside += found.low - 0.01 <= share <= found.high + 0.01
        widths.setdefault(rows, []).append(found.high - found.low)
    assert inside >= 54
    assert sum(widths[400]) < sum(widths[40]) < 0.8 * len(widths[40])


def test_the_meter_reads_the_agreement_of_the_branches_whatever_their_scale():
    """Temperatures and offsets of the logits differ between networks and tell nothing about the background."""
    fg, context, _, _ = draw(100)
    meter = known().batch.meter
    assert torch.allclose(meter.clues(5 * fg - 3, 0.2 * context + 1), meter.clues(fg, context), atol=1e-5)
    assert bool((meter.clues(fg, fg[None]) > meter.clues(fg, -fg[None])).all())
    constant = meter.clues(torch.ones(3, CLASSES), torch.zeros(1, 3, CLASSES))
    assert constant.isfinite().all()  # a branch that says nothing


@pytest.mark.parametrize("away", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_share_of_misleading_backgrounds_is_recovered(away):
    logits, has_fg, _ = place(400, away, seed=5)
    share = fuse_groups(known(), logits, has_fg, ["site"] * 400).shares["site"]
    assert abs(share.misled - away) < 0.1 and share.objects == 400
    assert share.low <= share.misled <= share.high and share.high - share.low < 0.25
    few = fuse_groups(known(), {b: z[:20] for b, z in logits.items()}, has_fg[:20], ["site"] * 20).shares["site"]
    assert few.high - few.low > share.high - share.low  # fewer images tell less


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("away", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_it_is_behind_neither_fg_nor_the_average_at_any_share(away, subtract):
    """Also where backgrounds always speak against the class, which no row that it was fitted on did."""
    logits, has_fg, labels = place(1500, away, subtract)
    fused = fuse_groups(known(), logits, has_fg, ["a"] * 1500).logits
    average = fuse_branches(create_fusion("average"), logits)
    assert right(fused, labels) > max(right(logits["fg"], labels), right(average, labels)) - 0.01


def test_two_places_are_told_apart():
    home, away = place(300, 0.0), place(300, 1.0, seed=2)
    logits = {b: torch.cat([home[0][b], away[0][b]]) for b in ("fg", "full")}
    found = fuse_groups(known(), logits, torch.ones(600, dtype=torch.bool), ["home"] * 300 + ["away"] * 300)
    alone = fuse_groups(known(), away[0], away[1], ["away"] * 300)
    assert found.shares["home"].high < found.shares["away"].low
    assert torch.equal(found.logits[300:], alone.logits)  # what another place is like changes nothing


def test_the_order_of_images_changes_nothing_to_the_last_bit():
    logits, has_fg, _ = place(200)
    groups = [str(i % 3) for i in range(200)]
    found = fuse_groups(known(), logits, has_fg, groups)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    again = fuse_groups(known(), {b: z[order] for b, z in logits.items()}, has_fg[order], [groups[i] for i in order.tolist()])
    assert torch.equal(again.logits, found.logits[order]) and again.shares == found.shares


@pytest.mark.parametrize("name", ["robust", "agreement", "average"])
def test_a_group_of_one_and_rows_without_an_object_are_fused_as_without_groups(name):
    logits, has_fg, _ = place(40)
    fusion = known(name)
    found = fuse_groups(fusion, logits, has_fg, list(range(40)))
    assert torch.equal(found.logits, fuse_branches(fusion, logits, has_fg))
    assert found.shares[0].high - found.shares[0].low > 0.7  # one image says little of its place
    has_fg[:20] = False
    found = fuse_groups(fusion, logits, has_fg, ["a"] * 40)
    assert torch.equal(found.logits[:20], logits["full"][:20]) and found.shares["a"].objects == 20
    only = fuse_groups(fusion, {b: z[20:] for b, z in logits.items()}, has_fg[20:], ["a"] * 20)
    assert torch.equal(found.logits[20:], only.logits)  # rows without an object say nothing of the place
    nothing = fuse_groups(fusion, logits, torch.zeros(40, dtype=torch.bool), ["a"] * 40)
    assert torch.equal(nothing.logits, logits["full"]) and nothing.shares["a"].misled == pytest.approx(0.5)


def test_the_batch_rule_is_saved_with_the_fusion_and_changes_nothing_of_one_image():
    fusion = known("average")
    again = create_fusion(fusion.config(), ("fg", "full"), CLASSES)
    again.load_state_dict(fusion.state_dict())
    logits, has_fg, _ = place(50)
    groups = ["a"] * 50
    assert torch.equal(fuse_groups(again, logits, has_fg, groups).logits, fuse_groups(fusion, logits, has_fg, groups).logits)
    plain = create_fusion("average")
    assert torch.equal(fuse_branches(again, logits), fuse_branches(plain, logits))
    assert torch.equal(torch.jit.script(again)(logits["fg"], logits["full"][None]), plain(logits["fg"], logits["full"][None]))
    assert create_fusion(fusion.unfitted(), 2, CLASSES).batch is None


def test_what_cannot_be_adapted_is_a_sentence():
    logits, has_fg, labels = place(20)
    with pytest.raises(L2R2Error, match="fit it with `l2r2 fuse`"):
        fuse_groups(create_fusion("robust"), logits, has_fg, ["a"] * 20)
    with pytest.raises(L2R2Error, match="19 groups for 20 rows"):
        fuse_groups(known(), logits, has_fg, ["a"] * 19)
    with pytest.raises(L2R2Error, match="true or false"):
        create_fusion({"name": "robust", "batch": "yes"}, 2, CLASSES)
    fusion = create_fusion({"name": "robust", "inputs": ["full", "bg"]}, ("full", "fg", "bg"), CLASSES)
    three = {**logits, "bg": logits["full"]}
    away = torch.arange(20) < 10
    assert fit_batch(fusion, three, labels, torch.ones(20), away, torch.ones(CLASSES)) is None  # no fg, nothing to compare

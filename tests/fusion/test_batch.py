"""Fusing images taken at the same place jointly: the fraction of misleading backgrounds is estimated without labels."""

from itertools import pairwise

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


def expectation_maximization(r, e, steps):
    """`docs/method.md`, section 4: the same posterior's mode, step by step, with its log-posterior after each."""
    found = []
    for _ in range(steps):
        found.append(float(((1 - e) * r + e).log().sum() + 0.5 * (e * (1 - e)).log()))
        w = (1 - e) * r / ((1 - e) * r + e)
        e = 1 - (w.sum() + 0.5) / (len(r) + 1)
    return e, found


@pytest.mark.parametrize("start", [0.05, 0.5, 0.95])
def test_expectation_maximization_climbs_to_the_peak_of_the_same_posterior(start):
    """An independent reference for the estimate: EM is monotone, ends in one place, and the posterior is around it."""
    fusion = known()
    logits, has_fg, _ = place(500, 0.3)
    r = fusion.batch.evidence(logits["fg"], logits["full"][None]).double().exp()
    e, climbed = expectation_maximization(r, torch.tensor(start, dtype=torch.float64), 500)
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(climbed))
    share = fuse_groups(fusion, logits, has_fg, ["a"] * 500).shares["a"]
    assert share.low < float(e) < share.high and abs(share.misled - float(e)) < 0.01


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

import pytest
import torch

from l2r2_models.errors import L2R2Error
from l2r2_models.fusion import FUSIONS, create_fusion, fuse_branches
from l2r2_models.fusion.calibration import (
    LIMITS,
    expected_calibration_error,
    fit_class_temperatures,
    fit_temperature,
)

NAMES = sorted(FUSIONS)
FITTED = [name for name in NAMES if create_fusion(name, 2, 5).count()]


def make(name, **settings):
    """A fusion of two branches and five classes, fitted on random logits where it would mean nothing otherwise."""
    fusion = create_fusion({"name": name, **settings}, 2, 5)
    if fusion.needs_fit:
        fg, context, labels = biased(400)
        fusion.fit(fg, context, labels)
    return fusion


def biased(count, seed=0, sure=4.0):
    """Logits of a good, modest fg branch and of a bad full branch that is very sure of itself, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    wrong = torch.randint(0, 5, (count,), generator=generator)
    noise = torch.randn(2, count, 5, generator=generator)
    one_hot = torch.eye(5)
    fg = 2.5 * one_hot[labels] + noise[0]
    said = torch.where(torch.rand(count, generator=generator) < 0.5, labels, wrong)
    return fg, (sure * (2.5 * one_hot[said] + noise[1]))[None], labels


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(200, 5), 3 * torch.randn(1, 200, 5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_box_are_the_full_logits_bit_for_bit(name, logits):
    fg, context = logits
    has_fg = torch.rand(200) < 0.5
    fused = fuse_branches(make(name), {"fg": fg, "full": context[0]}, has_fg)
    assert torch.equal(fused[~has_fg], context[0][~has_fg])
    assert torch.equal(fused[has_fg], make(name)(fg, context)[has_fg])


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_in_an_unused_row_does_not_spread(name, logits):
    fg, context = logits
    fg[0] = float("nan")
    has_fg = torch.ones(200, dtype=torch.bool)
    has_fg[0] = False
    assert fuse_branches(make(name), {"fg": fg, "full": context[0]}, has_fg).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_agreeing_branches_keep_their_prediction(name, logits):
    fg = 20 * torch.eye(5)[torch.randint(0, 5, (200,))] if name == "concat_mlp" else logits[0]  # an MLP needs a clear case
    assert torch.equal(make(name)(fg, 2 * fg[None]).argmax(-1), fg.argmax(-1))


def test_max_confidence_takes_the_row_of_the_more_confident_branch(logits):
    fg, context = logits
    sure = fg.softmax(-1).max(-1).values >= context[0].softmax(-1).max(-1).values
    expected = torch.where(sure[:, None], fg, context[0])
    assert torch.equal(create_fusion("max_confidence")(fg, context), expected)


def test_max_confidence_of_three_branches(logits):
    fg, context = logits
    three = torch.stack([fg, context[0], torch.flip(fg, (1,)) * 2])
    best = three.softmax(-1).amax(-1).argmax(0)
    expected = torch.stack([three[b, i] for i, b in enumerate(best.tolist())])
    assert torch.equal(create_fusion("max_confidence")(fg, three[1:]), expected)


def test_robust_is_fg_at_zero_and_max_confidence_at_one(logits):
    fg, context = logits
    assert torch.equal(create_fusion({"name": "robust", "threshold": 0})(fg, context), fg)
    at_one = create_fusion({"name": "robust", "threshold": 1})
    assert torch.equal(at_one(fg, context), create_fusion("max_confidence")(fg, context))


def test_robust_follows_fg_exactly_above_its_threshold(logits):
    fg, context = logits
    fused = create_fusion({"name": "robust", "threshold": 0.7})(fg, context)
    sure = fg.softmax(-1).max(-1).values > 0.7
    assert torch.equal(fused[sure], fg[sure])
    assert torch.equal(fused[~sure], create_fusion("max_confidence")(fg, context)[~sure])


def test_the_average_is_the_mean_of_the_logits(logits):
    fg, context = logits
    assert torch.allclose(create_fusion("average")(fg, context), (fg + context[0]) / 2)


def test_unknown_names_and_arguments_say_what_there_is():
    with pytest.raises(L2R2Error, match=r'Unknown fusion "rubust"; choose from agreement, average, concat_mlp, .*robust'):
        create_fusion("rubust")
    with pytest.raises(L2R2Error, match="does not take t; it takes threshold"):
        create_fusion({"name": "robust", "t": 0.5})
    with pytest.raises(L2R2Error, match="threshold from 0 to 1"):
        create_fusion({"name": "robust", "threshold": 1.5})


@pytest.mark.parametrize("config", [*NAMES, {"name": "robust", "threshold": 0.3}])
def test_a_config_builds_the_same_fusion_again(config, logits):
    fusion = create_fusion(config, 2, 5)
    again = create_fusion(fusion.config(), 2, 5)
    again.load_state_dict(fusion.state_dict())
    assert torch.equal(again(*logits), fusion(*logits))


def test_temperature_never_changes_a_prediction_and_minimizes_the_cross_entropy_with_three_rows_of_unknown_class():
    _, context, labels = biased(500)
    logits = context[0]
    best = fit_temperature(logits, labels)
    soft = 500 / 503 * torch.eye(5, dtype=torch.float64)[labels] + 3 / 503 / 5
    loss = lambda t: torch.nn.functional.cross_entropy(logits.double() / t, soft).item()  # noqa: E731
    assert best > 2  # it was four times too sure, and wrong half of the time
    assert loss(best) <= min(loss(best * 0.99), loss(best * 1.01))
    assert expected_calibration_error(logits / best, labels) < expected_calibration_error(logits, labels) / 2
    for name in ("max_scaled_confidence", "scaled_average"):
        fusion = create_fusion(name, 2, 5)
        fusion.fit(logits, context, labels)
        assert torch.equal(fusion.scaled(logits, context).argmax(-1)[0], logits.argmax(-1))


@pytest.mark.parametrize("rows", [20, 100, 500])
def test_rows_without_an_error_do_not_make_a_branch_overconfident(rows):
    labels = torch.arange(rows) % 5
    perfect = 10 * torch.eye(5)[labels]
    sure = (perfect / fit_temperature(perfect, labels)).softmax(-1).max(-1).values
    assert torch.allclose(1 - sure, torch.full_like(sure, 3 / (rows + 3) * 4 / 5), atol=1e-4)
    assert fit_temperature(perfect.flip(0), labels) == pytest.approx(LIMITS[1], rel=1e-3)  # never right: as unsure as may be


@pytest.mark.parametrize("name", FITTED)
def test_a_row_that_weighs_twice_is_two_rows(name):
    fg, context, labels = biased(60)
    away = torch.arange(60) % 2 == 0
    once, twice = create_fusion(name, 2, 5), create_fusion(name, 2, 5)
    once.fit(fg, context, labels, 1.0 + away.double(), away)
    again = torch.cat([torch.arange(60), away.nonzero()[:, 0]])
    twice.fit(fg[again], context[:, again], labels[again], None, away[again])
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(once.buffers(), twice.buffers()))


def test_no_branch_is_subtracted_where_it_speaks_against_the_class():
    fg, _, labels = biased(400)
    against = (3 * torch.eye(5)[(labels + 1) % 5])[None]
    fusion = create_fusion("weighted_logits", 2, 5)
    fusion.fit(fg, -against, labels)
    assert (fusion.weights >= 0).all()
    fusion.fit(fg, against - 3 * torch.eye(5)[labels], labels)
    assert (fusion.weights >= 0).all()


def test_calibration_error_against_a_plain_loop():
    fg, _, labels = biased(300)
    probability, answer = fg.softmax(-1).max(-1)
    total = 0.0
    for low in range(15):
        rows = [i for i in range(300) if low / 15 < probability[i] <= (low + 1) / 15]
        total += abs(sum(probability[i].item() - float(answer[i] == labels[i]) for i in rows))
    assert expected_calibration_error(fg, labels) == pytest.approx(total / 300, abs=1e-5)


def test_class_temperatures_lower_the_calibration_error_without_losing_accuracy():
    fg, _, labels = biased(400)
    fg = fg * torch.tensor([1.0, 3.0, 0.3, 2.0, 1.0])  # classes that are sure to different degrees
    temperatures = fit_class_temperatures(fg, labels)
    right = lambda z: (z.argmax(-1) == labels).sum()  # noqa: E731
    assert right(fg / temperatures) >= right(fg)
    shared = fit_temperature(fg, labels)
    assert expected_calibration_error(fg / temperatures, labels) <= expected_calibration_error(fg / shared, labels)


def test_the_fitted_threshold_is_the_best_of_all_and_the_lowest_of_equals():
    fg, context, labels = biased(300)
    fusion = create_fusion("robust")
    fusion.fit(fg, context, labels)

    def right(threshold):
        fused = create_fusion({"name": "robust", "threshold": threshold})(fg, context)
        return int((fused.argmax(-1) == labels).sum())

    chosen = fusion.threshold.item()
    every = {t: right(t) for t in [0.0, *fg.softmax(-1).amax(-1).tolist()]}
    assert right(chosen) == max(every.values())
    assert chosen == pytest.approx(min(t for t, n in every.items() if n == max(every.values())))


@pytest.mark.parametrize("name", FITTED)
def test_fitting_beats_trusting_the_branch_that_is_wrongly_sure(name):
    fusion = create_fusion(name, 2, 5)
    fusion.fit(*biased(600))
    fg, context, labels = biased(600, seed=1)
    right = lambda z: (z.argmax(-1) == labels).double().mean()  # noqa: E731
    assert right(fusion(fg, context)) > right(create_fusion("max_confidence")(fg, context)) + 0.05
    again = create_fusion(name, 2, 5)
    again.fit(*biased(600))
    assert all(torch.equal(a, b) for a, b in zip(fusion.buffers(), again.buffers()))  # the same on every run
    assert not list(fusion.parameters())  # no training step may move it


def test_weights_of_one_are_the_sum():
    fg, context, _ = biased(20)
    assert torch.allclose(create_fusion("weighted_logits", 2, 5)(fg, context), fg + context[0])


def test_the_weighted_average_reaches_both_ends():
    _, context, labels = biased(200)
    fusion = create_fusion("scaled_weighted_average", 2, 5)
    fusion.fit(10 * torch.eye(5)[labels], context, labels)
    assert fusion.weight == 1
    noise, knows = torch.randn(200, 5), 10 * torch.eye(5)[labels][None]
    fusion.fit(noise, knows, labels)
    assert fusion.weight < 1 and torch.equal(fusion(noise, knows).argmax(-1), labels)


@pytest.mark.parametrize("name", NAMES)
def test_three_branches(name):
    fg, context, labels = biased(100)
    fusion = create_fusion(name, 3, 5)
    both = torch.cat([context, context.flip(-1)])
    fusion.fit(fg, both, labels)
    assert fusion(fg, both).shape == (100, 5) and fusion(fg, both).isfinite().all()


def test_a_confidence_at_the_threshold_is_not_above_it():
    fg, context = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[[0.0, 3.0, 0.0]]])
    fusion = create_fusion("robust")
    fusion.threshold.copy_(fg.softmax(-1).amax())
    assert torch.equal(fusion(fg, context), context[0])
    fusion.threshold.copy_(torch.nextafter(fg.softmax(-1).amax(), torch.tensor(0.0)))
    assert torch.equal(fusion(fg, context), fg)


def test_the_threshold_does_not_part_rows_of_equal_confidence():
    """Five rows of one confidence: the full branch is right in two of them, fg in the other three. No threshold gets all five."""
    labels = torch.zeros(5, dtype=torch.long)
    right, wrong = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    fg = torch.stack([wrong, wrong, right, right, right])
    context = 2 * torch.stack([right, right, wrong, wrong, wrong])[None]
    fusion = create_fusion("robust")
    fusion.fit(fg, context, labels)
    assert (fusion(fg, context).argmax(-1) == labels).sum() == 3

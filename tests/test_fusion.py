import pytest
import torch

from l2r2_models.errors import L2R2Error
from l2r2_models.fusion import FUSIONS, create_fusion

NAMES = sorted(FUSIONS)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(200, 5), 3 * torch.randn(1, 200, 5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_box_are_the_full_logits_bit_for_bit(name, logits):
    fg, context = logits
    has_fg = torch.rand(200) < 0.5
    fused = create_fusion(name)(fg, context, has_fg)
    assert torch.equal(fused[~has_fg], context[0][~has_fg])
    assert torch.equal(fused[has_fg], create_fusion(name)(fg, context)[has_fg])


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_in_an_unused_row_does_not_spread(name, logits):
    fg, context = logits
    fg[0] = float("nan")
    has_fg = torch.ones(200, dtype=torch.bool)
    has_fg[0] = False
    assert create_fusion(name)(fg, context, has_fg).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_agreeing_branches_keep_their_answer(name, logits):
    fg, _ = logits
    assert torch.equal(create_fusion(name)(fg, 2 * fg[None]).argmax(-1), fg.argmax(-1))


def test_max_confidence_takes_the_row_of_the_surer_branch(logits):
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
    with pytest.raises(L2R2Error, match='Unknown fusion "rubust"; choose from average, max_confidence, robust'):
        create_fusion("rubust")
    with pytest.raises(L2R2Error, match="does not take t; it takes threshold"):
        create_fusion({"name": "robust", "t": 0.5})
    with pytest.raises(L2R2Error, match="threshold from 0 to 1"):
        create_fusion({"name": "robust", "threshold": 1.5})


@pytest.mark.parametrize("config", [*NAMES, {"name": "robust", "threshold": 0.3}])
def test_a_config_builds_the_same_fusion_again(config, logits):
    fusion = create_fusion(config)
    assert torch.equal(create_fusion(fusion.config())(*logits), fusion(*logits))

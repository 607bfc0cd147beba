"""The estimate of misleading backgrounds where images of one class resemble each other, as the frames of a video do."""

import torch

from l2r2_models.fusion.batch import shares_of
from l2r2_models.fusion.meter import ShiftMeter

CLASSES = 10


def frames(generator, away, each=9):
    """Logits of `each` images of every class; how well the branches agree depends on the background, the class and the video."""
    labels = torch.arange(CLASSES).repeat_interleave(each)
    fg = torch.randn(len(labels), CLASSES, generator=generator) + 4 * torch.eye(CLASSES)[labels]
    of_video = 0.3 * torch.randn(CLASSES, generator=generator)
    strength = torch.where(away, 0.6, 1.6) + of_video[labels]
    context = strength[:, None] * fg + 3 * torch.randn(len(labels), CLASSES, generator=generator)
    return fg, context[None], labels


def fitted(generator):
    half = CLASSES * 9
    away = torch.arange(2 * half) >= half
    usual = frames(generator, torch.zeros(half, dtype=torch.bool))
    other = frames(generator, torch.ones(half, dtype=torch.bool))
    fg, context, labels = (torch.cat([a, b], dim=1 if a.ndim == 3 else 0) for a, b in zip(usual, other))
    meter = ShiftMeter()
    meter.fit(fg, context, labels, away, torch.ones(2 * half))
    return meter


def share_of(meter, fg, context):
    return shares_of(meter, meter.clues(fg, context), fg.argmax(-1), ["a"] * len(fg))[1]["a"]


def test_the_interval_contains_the_true_share_though_the_images_of_a_class_are_no_independent_draws():
    inside = 0
    for seed in range(60):
        generator, share = torch.Generator().manual_seed(seed), (seed % 5) / 4
        meter = fitted(generator)
        away = torch.rand(CLASSES * 9, generator=generator) < share
        found = share_of(meter, *frames(generator, away)[:2])
        true = away.double().mean()
        inside += bool(found.low - 0.01 <= true <= found.high + 0.01)
    assert inside >= 54


def test_images_of_one_class_tell_less_than_as_many_of_several():
    meter = fitted(torch.Generator().manual_seed(0))
    clues = meter.moments[0].double().mean().expand(200)  # half way between both kinds
    widths = []
    for classes in (1, 3, 10):
        found = shares_of(meter, clues, torch.arange(200) % classes, ["a"] * 200)[1]["a"]
        widths.append(found.high - found.low)
    assert widths[0] > widths[1] + 0.02 and widths[1] > widths[2] + 0.1, widths


def test_moments_by_hand():
    """Two classes of two rows each, of both kinds, with weights: variance of all, covariance between classes."""
    torch.manual_seed(0)
    fg, context = torch.randn(8, 3), torch.randn(1, 8, 3)
    labels, away = torch.tensor([0, 0, 1, 1] * 2), torch.arange(8) >= 4
    weights = torch.tensor([1.0, 3.0, 2.0, 2.0] * 2)
    meter = ShiftMeter()
    meter.fit(fg, context, labels, away, weights)
    c = meter.clues(fg, context)
    m = [(c[i] * weights[i] + c[i + 1] * weights[i + 1]) / 4 for i in (0, 2, 4, 6)]
    mean = (m[0] + m[1]) / 2
    variance = (weights[:4].double() * (c[:4] - mean) ** 2).sum() / 8
    expected = torch.stack([mean, variance, torch.tensor(8.0, dtype=torch.double)])
    assert torch.allclose(meter.moments[:, 0].double(), expected, atol=1e-6)
    covariance = (m[0] - m[1]) * (m[2] - m[3]) / 2
    assert torch.allclose(meter.between.double()[0, 1], covariance, atol=1e-6) and meter.classes == 2

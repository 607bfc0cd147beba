"""The reference is F.interpolate on the padded canvas, and Pillow's resize of it."""

import pytest
import torch
from roi_views_cases import FILL, MEAN, NAN, STD, canvas_of, interpolate, noise_image, pillow, truth

INTERPOLATIONS = ["bilinear", "bicubic"]
BOXES = [
    (0, 0, 60, 40), (5, 3, 50, 21), (10, 10, 11, 40), (0, 0, 1, 1),
    (59, 39, 60, 40), (0, 7, 33, 40), (20, 0, 60, 9), (17, 12, 25, 20)
]  # fmt: skip


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("box", BOXES)
def test_float_mode_is_interpolate_on_the_padded_canvas(box, square, antialias, interpolation):
    image = noise_image(40, 60, seed=1)
    settings = {"size": (16, 19), "square": square, "antialias": antialias, "interpolation": interpolation}
    views, valid = truth([image], torch.tensor([box]), **settings)
    expected = interpolate(canvas_of(image, box, FILL, square), (16, 19), interpolation, antialias)
    assert valid.all()
    torch.testing.assert_close(views[0] * 255, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("box", BOXES)
def test_pil_mode_is_pillow_on_the_padded_canvas(box, interpolation):
    image = noise_image(40, 60, seed=2)
    views, _ = truth([image], torch.tensor([box]), size=16, mode="pil", interpolation=interpolation)
    assert torch.equal((views[0] * 255).round(), pillow(canvas_of(image, box, FILL), 16, interpolation).double())


def test_masked_pixels_are_fill_before_the_resize():
    image = noise_image(30, 20, seed=3)
    mask = torch.zeros(30, 20, dtype=torch.bool)
    mask[4:22, 3:15] = True
    box = (2, 1, 18, 29)
    for mode in ("float", "pil"):
        views, _ = truth([image], torch.tensor([box]), masks=[mask], size=12, mode=mode)
        canvas = canvas_of(image, box, FILL, mask=mask)
        expected = interpolate(canvas, 12) if mode == "float" else pillow(canvas, 12).double()
        torch.testing.assert_close(views[0] * 255, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "box, margin, integer",
    [
        ((10.2, 5.9, 20.1, 15.0), 0.0, (10, 5, 21, 15)),
        ((10.0, 5.0, 20.0, 15.0), 0.1, (9, 4, 21, 16)),
        ((10.0, 5.0, 20.0, 15.0), 0.25, (7, 2, 23, 18)),
        ((-7.0, -3.0, 900.0, 900.0), 0.0, (0, 0, 40, 30)),
        ((30.0, 20.0, 39.0, 29.0), 1.0, (21, 11, 40, 30)),
    ],
)
def test_margin_rounds_outwards_and_is_clipped(box, margin, integer):
    image = noise_image(30, 40, seed=4)
    views, valid = truth([image], torch.tensor([box]), margin=margin, size=10)
    assert valid.tolist() == [True]
    torch.testing.assert_close(views[0] * 255, interpolate(canvas_of(image, integer, FILL), 10), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "box",
    [
        (NAN,) * 4, (NAN, 0, 5, 5), (0, 0, float("inf"), 5), (5, 5, 5, 9), (9, 9, 5, 5), (40, 0, 50, 9), (0, 30, 9, 99),
        (-9, -9, 0, 0), (3e38, 0, -3e38, 5),
    ],
)  # fmt: skip
def test_a_box_without_pixels_gives_fill_and_is_not_valid(box):
    views, valid = truth([noise_image(30, 40, seed=5)], torch.tensor([box]), size=6, mean=MEAN, std=STD)
    assert valid.tolist() == [False]
    expected = (torch.tensor(FILL) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(views[0], expected[:, None, None].expand(3, 6, 6).double(), rtol=0, atol=1e-6)


def test_the_widest_finite_box_is_the_whole_image():
    image = noise_image(30, 40, seed=6)
    huge, valid = truth([image], torch.tensor([[-3e38, -3e38, 3e38, 3e38]]), size=6, margin=0.5)
    assert valid.all()
    assert torch.equal(huge, truth([image], torch.tensor([[0, 0, 40, 30]]), size=6)[0])


def test_normalisation_is_x_over_scale_minus_mean_over_std():
    image = noise_image(20, 20, seed=7)
    box = torch.tensor([[0, 0, 20, 20]])
    plain, _ = truth([image], box, size=8)
    normalized, _ = truth([image], box, size=8, mean=MEAN, std=STD, scale=200.0)
    expected = (plain * 255 / 200 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normalized, expected.double(), rtol=0, atol=1e-6)

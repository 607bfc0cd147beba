"""The CPU path against the float64 reference and against Pillow."""

import random

import pytest
import torch
from l2r2_kernels import roi_views
from roi_views_cases import FILL, MEAN, NAN, STD, TOLERANCE, canvas_of, levels_apart, noise_image, pillow, truth

SIZES = [(40, 60), (61, 33), (7, 90), (1, 1), (120, 3)]


def every_border(height, width):
    """Boxes at each border and corner, of one pixel, outside and missing."""
    w, h = width, height
    return torch.tensor(
        [
            [0, 0, w, h], [0, 0, w / 2, h / 2], [w / 2, h / 2, w, h], [-5, h / 3, w / 3, h + 9], [w / 3, -2, w + 4, h / 2],
            [w - 1, h - 1, w, h], [0, 0, 0.5, 0.5], [w + 1, h + 1, w + 3, h + 3], [NAN] * 4,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_cpu_is_within_tolerance(dtype, interpolation, antialias):
    images = [noise_image(h, w, seed=h, hwc=i % 2 == 1) for i, (h, w) in enumerate(SIZES)]
    boxes = torch.cat([every_border(h, w) for h, w in SIZES])
    index = torch.arange(len(SIZES)).repeat_interleave(9)
    settings = {
        "size": (24, 31),
        "mean": MEAN,
        "std": STD,
        "interpolation": interpolation,
        "antialias": antialias,
        "margin": 0.05,
    }
    for square in (True, False):
        views, valid = roi_views(images, boxes, index, square=square, dtype=dtype, **settings)
        expected, expected_valid = truth(images, boxes, index, square=square, **settings)
        assert views.dtype == dtype
        assert torch.equal(valid, expected_valid) and valid.sum() == 7 * len(SIZES)
        assert levels_apart(views, expected, STD) <= TOLERANCE[dtype]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pil_mode_is_pillow_bit_for_bit_on_random_crops(interpolation):
    rng = random.Random(7)
    images = [noise_image(rng.randint(1, 90), rng.randint(1, 90), seed=s, hwc=s % 2 == 0) for s in range(50)]
    index = torch.arange(50).repeat_interleave(40)
    boxes, canvases = [], []
    for i in index.tolist():
        height, width = (images[i].shape[1:], images[i].shape[:2])[images[i].shape[0] != 3]
        x0, y0 = rng.randrange(width), rng.randrange(height)
        box = (x0, y0, rng.randint(x0 + 1, width), rng.randint(y0 + 1, height))
        boxes.append(box)
        canvases.append(canvas_of(images[i], box, FILL))
    expected = torch.stack([pillow(canvas, 20, interpolation) for canvas in canvases])
    settings = {"size": 20, "mode": "pil", "interpolation": interpolation}
    boxes = torch.tensor(boxes).float()
    views, _ = roi_views(images, boxes, index, **settings)
    assert (views.mul(255).round().to(torch.uint8) != expected).sum() == 0
    some = slice(None, None, 4)  # the reference is slower
    views, _ = roi_views(images, boxes[some], index[some], backend="reference", **settings)
    assert (views.mul(255).round().to(torch.uint8) != expected[some]).sum() == 0


@pytest.mark.parametrize("antialias", [True, False])
def test_a_very_tall_image(antialias):
    image = noise_image(3000, 2, seed=8)
    boxes = torch.tensor([[0, 0, 2, 3000.0]])
    for interpolation in ("bilinear", "bicubic"):
        settings = {"size": (31, 16), "square": False, "interpolation": interpolation, "antialias": antialias}
        views, _ = roi_views([image], boxes, **settings)
        assert levels_apart(views, truth([image], boxes, **settings)[0]) <= 0.01


@pytest.mark.parametrize("mode", ["float", "pil"])
def test_masks_are_applied_before_the_resize(mode):
    images = [noise_image(40, 50, seed=9), noise_image(30, 20, seed=10, hwc=True)]
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    boxes = torch.tensor([[0, 0, 50, 40], [3, 2, 18, 30], [3, 2, 18, 30]])
    index = torch.tensor([0, 1, 1])
    masks = [None, mask, mask.to(torch.uint8) * 255]
    views, _ = roi_views(images, boxes, index, masks=masks, size=14, mode=mode)
    assert levels_apart(views, truth(images, boxes, index, masks, size=14, mode=mode)[0]) <= 0.01
    assert torch.equal(views[1], views[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_batch(dtype):
    batch = torch.rand(3, 3, 20, 26, generator=torch.Generator().manual_seed(2)).to(dtype)
    boxes = torch.tensor([[0, 0, 26, 20], [1, 2, 9, 19], [3, 3, 4, 4]])
    views, _ = roi_views(batch, boxes, size=11, fill=(0.4, 0.5, 0.6))
    assert levels_apart(views, truth(batch, boxes, size=11, fill=(0.4, 0.5, 0.6))[0]) <= 0.01


def test_memory_format_and_uint8_batch():
    batch = torch.stack([noise_image(20, 22, seed=s) for s in range(2)])
    boxes = torch.tensor([[0, 0, 22, 20], [4, 4, 20, 9]])
    views, _ = roi_views(batch, boxes, size=12)
    last, _ = roi_views(batch.contiguous(memory_format=torch.channels_last), boxes, size=12, memory_format=torch.channels_last)
    assert views.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, last)
    assert torch.equal(views, roi_views(list(batch), boxes, size=12)[0])


def test_no_views():
    views, valid = roi_views([noise_image(9, 9, seed=1)], torch.empty(0, 4), torch.empty(0, dtype=torch.int64), size=5)
    assert views.shape == (0, 3, 5, 5) and valid.shape == (0,)

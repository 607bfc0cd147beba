"""Occlusion of the object in training."""

import pytest
import torch

from l2r2_models import L2R2Error
from l2r2_models.data.augment import Augment

BOX = torch.tensor([20.0, 10.0, 60.0, 40.0])
STILL = dict(scale=1.0, flip=0.0, color=0.0, box_jitter=0.0)


def black(height=60, width=80):
    return torch.zeros(height, width, 3, dtype=torch.uint8)


def test_occlusion_covers_a_part_of_the_object_and_nothing_else():
    shares = []
    for i in range(200):
        pixels, box, _ = Augment(**STILL, occlusion=1.0)(black(), BOX, None, seed=(i,))
        covered = pixels.amax(-1) > 0
        assert torch.equal(box, BOX) and not covered[:10].any() and not covered[40:].any()
        assert not covered[:, :20].any() and not covered[:, 60:].any()
        shares.append(covered[10:40, 20:60].float().mean().item())
    assert min(shares) > 0.03 and max(shares) < 0.45 and max(shares) - min(shares) > 0.2


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_occlusion_has_the_requested_probability(probability):
    augment = Augment(**STILL, occlusion=probability)
    seen = [bool(augment(black(), BOX, None, seed=(i,))[0].any()) for i in range(300)]
    assert abs(sum(seen) / 300 - probability) < 0.09


def test_occlusion_follows_the_object_through_crop_and_flip_and_leaves_the_given_pixels_alone():
    pixels = black()
    pixels[10:40, 20:60] = 255
    augment = Augment(scale=0.3, color=0.0, box_jitter=0.0, occlusion=1.0)
    for i in range(40):
        moved, box, mask = augment(pixels, BOX, pixels[..., 0] > 0, seed=(i,))
        x0, y0, x1, y1 = box.int().tolist()
        outside = torch.ones(moved.shape[:2], dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert moved[outside].max() == 0 and (moved[y0:y1, x0:x1] < 255).any() and mask[y0:y1, x0:x1].all()
    assert pixels[10:40, 20:60].min() == 255


def test_without_an_object_nothing_is_covered_and_other_draws_do_not_change():
    pixels = torch.randint(0, 255, (50, 50, 3), dtype=torch.uint8)
    nowhere = torch.full((4,), float("nan"))
    for box in (nowhere, BOX):
        plain, hidden = (Augment(occlusion=p)(pixels, box, None, seed=(3,)) for p in (0.0, 1.0))
        assert torch.equal(plain[1].nan_to_num(-1), hidden[1].nan_to_num(-1)) and plain[0].shape == hidden[0].shape
        assert torch.equal(plain[0], hidden[0]) == bool(box.isnan().any())


def test_a_probability_beyond_one_is_refused():
    with pytest.raises(L2R2Error, match="occlusion must lie between 0 and 1"):
        Augment(occlusion=1.5)

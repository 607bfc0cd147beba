"""Backgrounds without their object, and objects on other backgrounds."""

import pytest
import torch
import torch.nn.functional as F

from l2r2_models.data.composite import background_of, cover, object_alpha, paste_object
from l2r2_models.errors import L2R2Error
from l2r2_models.images import FILL

BOX = torch.tensor([20.0, 12.0, 44.0, 30.0])


def noise(height=48, width=64, low=0, high=120, seed=0):
    return torch.randint(low, high, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def with_object(box=BOX, value=255, **options):
    """Dark noise with a bright rectangle, so that a bright pixel can only be the object's."""
    pixels = noise(**options)
    x0, y0, x1, y1 = box.int().tolist()
    pixels[max(y0, 0) : y1, max(x0, 0) : x1] = value
    return pixels


@pytest.mark.parametrize(
    "box",
    [
        BOX,
        torch.tensor([0.0, 0.0, 30.0, 48.0]),  # a whole side of the image
        torch.tensor([-5.0, -5.0, 63.0, 47.0]),  # one row and one column are left
        torch.tensor([2.0, 10.0, 62.0, 20.0]),  # strips much narrower than the box
        torch.tensor([10.0, 10.0, 12.0, 11.0]),
    ],
)
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_a_background_holds_no_pixel_of_its_object_and_is_unchanged_elsewhere(box, margin):
    pixels = with_object(box)
    background = background_of(pixels, box, margin=margin)
    assert background.max() < 200 and background.dtype == torch.uint8
    x0, y0, x1, y1 = (box + margin * (box[2:] - box[:2]).repeat(2) * torch.tensor([-1, -1, 1, 1])).tolist()
    outside = torch.ones(pixels.shape[:2], dtype=torch.bool)
    outside[max(0, int(y0 - 1)) : int(y1 + 1), max(0, int(x0 - 1)) : int(x1 + 1)] = False
    assert torch.equal(background[outside], pixels[outside])


def test_the_background_does_not_depend_on_the_object_it_hides():
    """Neither its color nor its outline: only where its box is."""
    flat, shape = with_object(), with_object(value=0)
    shape[15:25, 25:30] = 200
    assert torch.equal(background_of(flat, BOX), background_of(shape, BOX))


def test_several_objects_are_never_mirrored_into_each_other():
    boxes = torch.stack([BOX, torch.tensor([46.0, 12.0, 60.0, 30.0]), torch.tensor([0.0, 12.0, 18.0, 30.0])])
    pixels = with_object()
    for x0, y0, x1, y1 in boxes.int().tolist():
        pixels[y0:y1, x0:x1] = 255
    assert background_of(pixels, boxes, margin=0).max() < 200


def test_the_filling_leaves_no_seam_on_a_smooth_background():
    ramp = (torch.arange(64) * 2)[None, :, None].expand(48, 64, 3).to(torch.uint8).contiguous()
    filled = background_of(ramp, BOX).int()
    assert (filled[:, 1:] - filled[:, :-1]).abs().max() <= 8 and (filled[1:] - filled[:-1]).abs().max() <= 8


def test_a_mask_that_leaves_its_box_is_removed_whole():
    pixels, mask = with_object(), torch.zeros(48, 64, dtype=torch.bool)
    mask[10:32, 15:50] = True
    pixels[mask] = 255
    assert background_of(pixels, BOX, mask, margin=0).max() < 200
    assert background_of(pixels, torch.full((4,), float("nan")), mask, margin=0).max() < 200


def test_an_image_that_is_all_object_has_the_mean_color_as_background():
    pixels = noise()
    background = background_of(pixels, torch.tensor([0.0, 0.0, 64.0, 48.0]))
    assert background.reshape(-1, 3).unique(dim=0).tolist() == [list(FILL)]


def test_a_box_outside_of_the_image_and_a_mask_of_another_size_are_refused():
    with pytest.raises(L2R2Error, match="covers no pixel of its 64x48 image"):
        background_of(noise(), torch.tensor([70.0, 0.0, 90.0, 20.0]))
    with pytest.raises(L2R2Error, match="mask is 60x48, but its image is 64x48"):
        background_of(noise(), BOX, torch.ones(48, 60, dtype=torch.bool))
    with pytest.raises(L2R2Error, match="mask is 60x48, but its image is 64x48"):
        paste_object(noise(), BOX, torch.ones(48, 60, dtype=torch.bool), noise())
    with pytest.raises(L2R2Error, match="feather must lie"):
        paste_object(noise(), BOX, None, noise(), feather=0.7)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feather", [0.0, 0.1, 0.3])
def test_a_pasted_object_is_itself_inside_and_the_background_outside(masked, feather):
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[14:29, 22:42] = True
    pixels, background = noise(seed=1), noise(low=150, high=255, seed=2)
    alpha = object_alpha((48, 64), BOX, mask if masked else None, feather)
    pasted = paste_object(pixels, BOX, mask if masked else None, background, feather=feather)
    assert torch.equal(pasted[alpha == 0], background[alpha == 0]) and torch.equal(pasted[alpha == 1], pixels[alpha == 1])
    soft = (alpha > 0) & (alpha < 1)
    assert soft.any() == (feather > 0) and alpha[21, 32] == 1 and alpha[0].max() == 0
    assert (alpha[21, :30].diff() >= 0).all() and (alpha[21, 34:].diff() <= 0).all()  # falls off outwards
    if masked:  # nothing of the old background comes along
        assert (alpha[~mask] == 0).all()
    else:  # a crop to the box shows what it showed
        assert (alpha[12:30, 20:44] == 1).all() and (soft.sum() <= (18 + 24 + 2 * 6) * 2 * 6)


def test_thin_parts_of_a_masked_object_stay_visible():
    wire = torch.zeros(48, 64, dtype=torch.bool)
    wire[20, 5:60] = True
    wire[10:40, 30] = True
    alpha = object_alpha((48, 64), BOX, wire, 0.3)
    assert alpha[wire].min() >= 0.5 and alpha[~wire].max() == 0


def test_an_object_that_the_image_cuts_off_has_no_soft_edge_there():
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[10:, :30] = True
    alpha = object_alpha((48, 64), BOX, mask, 0.2)
    assert (alpha[20:, 0] == 1).all() and (alpha[-1, :20] == 1).all() and alpha[10, 5] < 1 and alpha[30, 29] < 1


def test_an_empty_mask_counts_as_none():
    empty = torch.zeros(48, 64, dtype=torch.bool)
    assert torch.equal(object_alpha((48, 64), BOX, empty), object_alpha((48, 64), BOX, None))


@pytest.mark.parametrize("size", [(20, 90), (100, 30), (48, 64), (7, 7)])
def test_a_background_of_any_size_covers_the_image_without_bars_or_distortion(size):
    assert cover(noise(*size), (48, 64)).shape == (48, 64, 3)
    left_half = torch.zeros(*size, 3, dtype=torch.uint8)
    left_half[:, : size[1] // 2] = 200
    if size[1] % 2 == 0:  # cut evenly: the middle stays in the middle
        covered = cover(left_half, (48, 64)).float().mean((0, 2))
        assert covered[:20].mean() > 150 and covered[-20:].mean() < 50


@pytest.mark.parametrize("shape", [(4, 65_500), (65_500, 4), (1, 30_000)])
def test_a_very_long_background_is_cut_before_it_is_resized(shape, monkeypatch):
    """Resized as a whole, 4 x 65,500 pixels would take 77 GB for an image of 1,000 x 700."""
    resize, largest = F.interpolate, []

    def watched(x, size, **options):
        largest.append(size[0] * size[1])
        return resize(x, size, **options)

    monkeypatch.setattr(F, "interpolate", watched)
    ramp = torch.linspace(0, 255, max(shape)).to(torch.uint8)
    background = (ramp[None] if shape[0] < shape[1] else ramp[:, None]).expand(shape)[..., None].repeat(1, 1, 3)
    covered = cover(background, (700, 1000))
    assert covered.shape == (700, 1000, 3) and max(largest) < 4 * 700_000
    assert (covered.float() - 127).abs().max() <= 2  # the middle of the ramp

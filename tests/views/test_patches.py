"""Decoding no finer than the views need: the same views as from the whole image, from far fewer pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from l2r2_models.errors import L2R2Error
from l2r2_models.images import LazyImage, load_image
from l2r2_models.views import ViewSpec, decode_patches, make_views

LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # normalized values are levels of 255
BOXES = torch.tensor([[101.3, 77.8, 480.2, 390.1], [10, 20, 40.5, 61], [-30, 150, 650, 700], [torch.nan] * 4, [50, 50, 50, 50]])
NO_BOX = torch.full((1, 4), torch.nan)
ORIENTATION = 0x0112


def ramps(width, height):
    """An image whose levels say where a pixel is: a view of it that is shifted or stretched has other levels."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    x, y = 200 * x / max(width, height), 200 * y / max(width, height)
    levels = [20 + x, 20 + y, 120 + x / 2 - y / 2]
    return Image.fromarray(np.stack(levels, -1).round().astype(np.uint8))


def photo(width, height, seed=0):
    """Blobs of all sizes and some noise, as a photo has: less contrast the finer the detail."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 9):
        small = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return Image.fromarray((total * 0.9 + rng.normal(0, 3, total.shape)).clip(0, 255).astype(np.uint8))


def encode(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **({"quality": 90} if format == "JPEG" else {}) | options)
    return stream.getvalue()


def both(data, spec, boxes=BOXES, branches=("full", "fg"), masks=None):
    """The views from patches, those from the whole image, and the patches."""
    index = torch.zeros(len(boxes), dtype=torch.long)
    patches = decode_patches(LazyImage(data), boxes, spec, branches)
    cut = [make_views([i], boxes, spec, branches=branches, image_index=index, masks=masks) for i in (patches, load_image(data))]
    return *cut, patches


def assert_close(ours, whole, square=True):
    """Views of ramps: half a pixel of shift is 3 levels, and a padded edge is up to 100 levels high."""
    error = (ours - whole).abs()
    assert error.flatten().quantile(0.95) < 1 and error.max() < (16 if square else 2)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(640, 480), (637, 419), (411, 801)])
def test_views_are_where_those_of_the_whole_image_are(size, format, square):
    spec = ViewSpec(size=32, decode="scaled", margin=0.1, square=square, **LEVELS)
    ours, whole, patches = both(encode(ramps(*size), format), spec)
    assert torch.equal(ours.has_fg, whole.has_fg) and patches.pixels < 0.4 * size[0] * size[1]
    for branch in ("full", "fg"):
        assert_close(getattr(ours, branch), getattr(whole, branch), square)


@pytest.mark.parametrize("sizes", [{"full": 16}, {"fg": 16}, {"full": 24, "fg": 64}])
def test_branches_of_different_sizes_get_the_detail_that_each_needs(sizes):
    spec = ViewSpec(size=32, sizes=sizes, decode="scaled", **LEVELS)
    boxes = torch.cat([BOXES, torch.tensor([[0.0, 0, 640, 480]])])
    ours, whole, patches = both(encode(ramps(640, 480)), spec, boxes)
    for branch in ("full", "fg"):
        view = getattr(ours, branch)
        assert view.shape[-1] == spec.size_of(branch)
        assert_close(view, getattr(whole, branch))
    least = max(spec.size_of("full"), spec.size_of("fg"))  # fg shows the whole image too, in rows without a box
    assert max(patches.parts[0, 0, 640, 480].shape) >= 2 * least


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_photo_differs_by_a_level_or_so(interpolation):
    """The tolerance that docs/method.md states."""
    for seed in range(4):
        spec = ViewSpec(size=(32, 48, 64, 96)[seed], decode="scaled", interpolation=interpolation, **LEVELS)
        ours, whole, _ = both(encode(photo(800, 600, seed)), spec)
        for branch in ("full", "fg"):
            error = (getattr(ours, branch) - getattr(whole, branch)).abs()
            assert error.mean() < 0.5 and error.flatten().quantile(0.99) < 4, (branch, error.mean())


@pytest.mark.parametrize("mode", ["float", "pil"])
@pytest.mark.parametrize("decode", ["full", "scaled"])
def test_nothing_changes_where_nothing_is_reduced(mode, decode):
    """Small images, views as large as their boxes, and `pil` mode, which equals Pillow in every bit."""
    spec = ViewSpec(size=224, decode="full" if mode == "pil" else decode, mode=mode, margin=0.05)
    ours, whole, _ = both(encode(photo(440, 300)), spec)
    assert torch.equal(ours.full, whole.full) and torch.equal(ours.fg, whole.fg)
    spec = ViewSpec(size=16, decode="full", mode=mode)
    ours, whole, _ = both(encode(photo(700, 500)), spec)
    assert torch.equal(ours.full, whole.full) and torch.equal(ours.fg, whole.fg)


def test_no_more_is_decoded_than_the_finest_view_needs(monkeypatch):
    decoded = []
    original = LazyImage.load
    monkeypatch.setattr(LazyImage, "load", lambda self, scale=1: decoded.append(scale) or original(self, scale))
    data, spec = encode(ramps(800, 600)), ViewSpec(size=48, decode="scaled")
    sizes = {(0, 0, 400, 400): 4, (0, 0, 200, 100): 2, (0, 0, 190, 100): 1, (0, 0, 800, 600): 8}
    for box, scale in sizes.items():
        patches = decode_patches(LazyImage(data), torch.tensor([box]).float(), spec, ("full", "fg"))
        assert decoded.pop() == scale and not decoded  # one decode serves all views
        assert patches.parts[(0, 0, 800, 600)].shape == (76, 100, 3)  # half a row of padding at both ends
    assert decode_patches(LazyImage(data), None, spec, ("full", "fg")).pixels == 76 * 100


@pytest.mark.parametrize("size", [(640, 480), (633, 473)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, size):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(ramps(*size), exif=exif)
    image = LazyImage(data)
    assert image.size == (load_image(data).height, load_image(data).width)
    ours, whole, _ = both(data, ViewSpec(size=32, decode="scaled", **LEVELS))
    assert_close(ours.full, whole.full)
    assert_close(ours.fg, whole.fg)
    ours, whole, _ = both(data, ViewSpec(size=24, decode="scaled", square=False, **LEVELS), NO_BOX)  # at an eighth
    assert_close(ours.full, whole.full, square=False)


@pytest.mark.parametrize("size", [(600, 5), (3, 700), (633, 473), (640, 480)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_reduced_images_have_the_size_that_the_scale_says(size, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = LazyImage(encode(ramps(*size), exif=exif))
    for scale in (1, 2, 4, 8):
        assert image.load(scale).size == (-(-image.size[1] // scale), -(-image.size[0] // scale))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grayscale_cmyk_and_progressive_files(mode, progressive):
    data = encode(ramps(640, 480).convert(mode), progressive=progressive)
    ours, whole, _ = both(data, ViewSpec(size=32, decode="scaled", **LEVELS))
    assert_close(ours.full, whole.full)
    assert_close(ours.fg, whole.fg)


def test_masks_stay_those_of_the_original_pixels():
    mask = torch.zeros(480, 640, dtype=torch.bool)
    mask[100:300, 200:500] = True
    boxes, empty = BOXES[:2], torch.zeros_like(mask)
    ours, whole, _ = both(encode(ramps(640, 480)), ViewSpec(size=32, decode="scaled"), boxes, masks=[mask, empty])
    assert ours.has_fg.tolist() == whole.has_fg.tolist() == [True, False]
    late = ViewSpec(size=32, decode="scaled", fg_mode="late")
    ours, whole, patches = both(encode(ramps(640, 480)), late, boxes, masks=[mask, None])
    assert torch.equal(ours.mask, whole.mask) and ours.fg is None and len(patches.parts) == 1


def test_patches_of_other_boxes_or_for_replaced_pixels_are_refused():
    patches = decode_patches(LazyImage(encode(ramps(300, 200))), BOXES[:1], ViewSpec(size=16), ("full", "fg"))
    with pytest.raises(L2R2Error, match="other boxes"):
        make_views([patches], torch.tensor([[0.0, 0, 9, 9]]), ViewSpec(size=16))
    with pytest.raises(L2R2Error, match="replaced pixels"):
        make_views([patches], BOXES[:1], ViewSpec(size=16, fg_mode="masked_crop"))


def test_a_truncated_file_is_refused_at_every_scale():
    data = encode(photo(640, 480))[:5000]
    for scale in (1, 2, 4, 8):
        with pytest.raises(L2R2Error, match="damaged or truncated"):
            LazyImage(data, name="a.jpg").load(scale)

"""make_views against references written here with Pillow and F.interpolate; cut_batch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from l2r2_models.errors import L2R2Error
from l2r2_models.views import ViewSpec, cut_batch, make_views

NAN = float("nan")
NONE = [NAN] * 4
FILL = (124, 116, 104)
SIZES = [(48, 64), (64, 48), (37, 91), (5, 120), (24, 24)]  # height, width
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # normalized values are levels of 255
BRANCHES = ("full", "fg", "bg")


def picture(size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def blob(size):
    """A mask that is no rectangle."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return (y / size[0] - 0.5) ** 2 + (x / size[1] - 0.45) ** 2 < 0.08


def window_of(box, size, margin):
    grow_x, grow_y = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    low = max(0, math.floor(box[0] - grow_x)), max(0, math.floor(box[1] - grow_y))
    return *low, min(size[1], math.ceil(box[2] + grow_x)), min(size[0], math.ceil(box[3] + grow_y))


def canvas_of(image, branch, spec, box, mask):
    """The reference up to the resize: mask, crop, pad; uint8 `[h, w, 3]`."""
    size = image.shape[:2]
    image, fill = image.numpy().copy(), np.array(spec.fill, np.uint8)
    x0, y0, x1, y1 = window_of(box, size, 0.0)
    inside = np.zeros(size, bool)
    inside[y0:y1, x0:x1] = True
    thing = inside if mask is None else mask.numpy()
    if branch == "bg" and spec.bg == "box":
        rows, columns = np.nonzero(inside | thing)  # nothing of an object sticks out of what hides it
        image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = fill
    elif branch == "bg":
        image[thing] = fill
    if branch == "fg" and spec.fg_mode != "crop":
        image[~thing] = fill
    if branch == "fg" and spec.fg_mode != "masked":
        x0, y0, x1, y1 = window_of(box, size, spec.margin)
        image = image[y0:y1, x0:x1]
    if not spec.square:
        return image
    height, width = image.shape[:2]
    side = max(height, width)
    canvas = np.broadcast_to(fill, (side, side, 3)).copy()
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def reference(image, branch, spec, box, mask=None):
    """Levels `[3, S, S]` of one view."""
    canvas = canvas_of(image, branch, spec, box, mask)
    if spec.mode == "pil":
        how = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
        return torch.from_numpy(np.array(Image.fromarray(canvas).resize((spec.size, spec.size), how))).permute(2, 0, 1).float()
    x = torch.from_numpy(canvas).permute(2, 0, 1)[None].double()
    return F.interpolate(x, (spec.size, spec.size), mode=spec.interpolation, antialias=True, align_corners=False)[0].float()


def boxes_in(size):
    """Boxes inside of, across the borders of and as large as an image of (height, width); quarters, exact in float32."""
    h, w = size
    boxes = [
        [0.2 * w, 0.1 * h, 0.7 * w, 0.9 * h],
        [-9.5, -3.2, 0.4 * w, 0.5 * h],
        [0.6 * w, 0.5 * h, w + 20, h + 3.5],
        [0, 0, w, h],
        [0.31 * w, 0.3 * h, 0.31 * w + 0.2, 0.3 * h + 0.2],
        [-1e6, 0.2 * h, 1e6, 0.8 * h],
    ]
    return [[math.floor(4 * v) / 4 for v in box[:2]] + [math.ceil(4 * v) / 4 for v in box[2:]] for box in boxes]


def compare(size, spec, masked, tolerance):
    image = picture(size)
    for box in boxes_in(size):
        mask = blob(size) if masked else None
        x0, y0, x1, y1 = window_of(box, size, spec.margin)
        if masked and not mask[y0:y1, x0:x1].any():
            continue  # the fallback has its own test
        views = make_views([image], torch.tensor([box]), spec, branches=BRANCHES, masks=[mask])
        assert views.has_fg.tolist() == [True]
        for branch in BRANCHES:
            expected = reference(image, branch, spec, box, mask)
            error = (getattr(views, branch)[0] - expected).abs().max().item()
            assert error <= tolerance, (branch, box, error)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "fg, masked, margin", [("crop", False, 0), ("crop", True, 0.25), ("masked_crop", True, 0.125), ("masked", False, 0)]
)
def test_pil_mode_is_pillow_bit_for_bit(fg, masked, margin, interpolation):
    for size in SIZES:
        spec = ViewSpec(size=32, fg_mode=fg, margin=margin, interpolation=interpolation, mode="pil", **LEVELS)
        compare(size, spec, masked, 1e-4)  # float32 normalization; a level that is off by one shows


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
@pytest.mark.parametrize("masked", [True, False])
def test_float_mode_is_interpolate_on_the_padded_canvas(fg, masked, square, interpolation):
    for i, size in enumerate(SIZES):
        bg = ("shape", "box")[i % 2]
        spec = ViewSpec(size=32, fg_mode=fg, bg=bg, margin=(0, 0.25)[i % 2], square=square, interpolation=interpolation, **LEVELS)
        compare(size, spec, masked, 0.01)


@pytest.mark.parametrize("bg", ["shape", "box"])
def test_bg_with_and_without_outline(bg):
    spec = ViewSpec(size=24, bg=bg, mode="pil", fill=(0, 0, 0), **LEVELS)
    image, mask = torch.full((24, 24, 3), 255, dtype=torch.uint8), torch.zeros(24, 24, dtype=torch.bool)
    mask[10, 5:15] = True
    view = make_views([image], torch.tensor([[5.0, 5, 15, 15]]), spec, branches=("bg",), masks=[mask]).bg[0, 0]
    erased = mask.clone()
    if bg == "box":
        erased[5:15, 5:15] = True
    assert torch.equal(view.round() == 0, erased)


def test_values_are_normalized():
    image = torch.full((10, 10, 3), 200, dtype=torch.uint8)
    spec = ViewSpec(size=8)
    full = make_views([image], None, spec).full[0, :, 4, 4]
    assert full.tolist() == pytest.approx([(200 / 255 - m) / s for m, s in zip(spec.mean, spec.std)], abs=1e-5)


# ---- fallback ----


@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
@pytest.mark.parametrize("mode", ["float", "pil"])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_a_row_without_a_box_shows_the_whole_image(fg, mode, margin):
    spec = ViewSpec(size=20, fg_mode=fg, mode=mode, margin=margin)
    images = [picture(s, i) for i, s in enumerate(SIZES)]
    boxes = torch.tensor([NONE, [10, 10, 5, 20], [200, 0, 300, 9], [3, 3, 3, 3], [0, 0, float("inf"), 5]])
    for given in (boxes, None):
        for masks in (None, [None] * 5, [torch.ones(s, dtype=torch.bool) for s in SIZES]):
            views = make_views(images, given, spec, branches=BRANCHES, masks=masks)
            assert views.has_fg.dtype == torch.bool and not views.has_fg.any()
            assert torch.equal(views.fg, views.full) and torch.equal(views.bg, views.full)


@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
def test_an_empty_mask_falls_back(fg):
    size = (30, 40)
    views = make_views(
        [picture(size)] * 2,
        torch.tensor([[5.0, 5, 20, 20]] * 2),
        ViewSpec(size=16, fg_mode=fg),
        branches=BRANCHES,
        masks=[torch.zeros(size, dtype=torch.bool), blob(size)],
    )
    assert views.has_fg.tolist() == [False, True]
    assert torch.equal(views.fg[0], views.full[0]) and torch.equal(views.bg[0], views.full[0])
    assert not torch.equal(views.fg[1], views.full[1])


def test_a_mask_that_misses_the_crop_falls_back_instead_of_showing_nothing():
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[25:, 35:] = True
    images, boxes = [picture((30, 40))], torch.tensor([[5.0, 5, 20, 20]])
    views = make_views(images, boxes, ViewSpec(size=16, fg_mode="masked_crop"), masks=[mask])
    assert views.has_fg.tolist() == [False] and torch.equal(views.fg, views.full)
    wide = make_views(images, boxes, ViewSpec(size=16, fg_mode="masked_crop", margin=2.0), masks=[mask])
    assert wide.has_fg.tolist() == [True]


def test_only_the_requested_branches_are_made():
    views = make_views([picture((20, 20))], None, ViewSpec(size=8), branches=("bg",))
    assert views.full is None and views.fg is None and views.bg.shape == (1, 3, 8, 8)


# ---- several images, several boxes ----


def several():
    images = [picture(s, i) for i, s in enumerate(SIZES[:3])]
    index = torch.tensor([2, 0, 0, 1, 2, 0])
    boxes = torch.tensor([[5.0, 5, 30, 30], [1, 2, 40, 30], NONE, [10, 3, 47, 60], [-5, 0, 20, 99], [30, 10, 64, 48]])
    masks = [None, blob(SIZES[0]), None, blob(SIZES[1]), torch.zeros(SIZES[2], dtype=torch.bool), None]
    return images, index, boxes, masks


@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
@pytest.mark.parametrize("mode", ["float", "pil"])
def test_a_batch_equals_one_by_one(fg, mode):
    images, index, boxes, masks = several()
    spec = ViewSpec(size=24, fg_mode=fg, mode=mode)
    together = make_views(images, boxes, spec, branches=BRANCHES, image_index=index, masks=masks)
    assert together.has_fg.tolist() == [True, True, False, True, False, True]
    for row, i in enumerate(index.tolist()):
        alone = make_views([images[i]], boxes[row : row + 1], spec, branches=BRANCHES, masks=masks[row : row + 1])
        for branch in BRANCHES:
            assert torch.equal(getattr(together, branch)[row], getattr(alone, branch)[0]), (row, branch)


def test_images_that_no_box_names_are_no_matter():
    images, index, boxes, _ = several()
    without = make_views(images, boxes[1:3], ViewSpec(size=16), image_index=index[1:3])
    alone = make_views(images[:1], boxes[1:3], ViewSpec(size=16), image_index=index[1:3])
    assert torch.equal(without.fg, alone.fg) and torch.equal(without.full, alone.full) and without.full.shape[0] == 2


def test_an_index_without_boxes_gives_that_many_rows():
    images, index, _, _ = several()
    views = make_views(images, None, ViewSpec(size=16), image_index=index)
    assert views.full.shape[0] == 6 and torch.equal(views.full[0], views.full[4]) and not views.has_fg.any()


def test_pil_images_equal_tensors():
    image = picture((33, 47))
    boxes = torch.tensor([[3.0, 4, 30, 20]])
    views = [make_views([i], boxes, ViewSpec(size=16)) for i in (image, Image.fromarray(image.numpy()))]
    assert torch.equal(views[0].fg, views[1].fg) and torch.equal(views[0].full, views[1].full)


@pytest.mark.parametrize("width", [1, 3, 4, 40])
@pytest.mark.parametrize("height", [1, 3, 4])
@pytest.mark.parametrize("mode", ["float", "pil"])
def test_tiny_images_are_not_mistaken_for_channels_first(height, width, mode):
    """`[3, W, 3]` could be read as three channels of `[W, 3]`."""
    image, spec = picture((height, width)), ViewSpec(size=12, mode=mode, **LEVELS)
    box = [0, 0, max(1, width // 2), 2]
    views = make_views([image], torch.tensor([box], dtype=torch.float32), spec)
    assert (views.full[0] - reference(image, "full", spec, box)).abs().max() < 0.01
    assert (views.fg[0] - reference(image, "fg", spec, box)).abs().max() < 0.01


def test_inputs_stay_as_they_are():
    images, index, boxes, masks = several()
    before = [i.clone() for i in images], boxes.clone(), [None if m is None else m.clone() for m in masks]
    make_views(images, boxes, ViewSpec(size=8, fg_mode="masked_crop"), branches=BRANCHES, image_index=index, masks=masks)
    assert all(map(torch.equal, images, before[0])) and torch.equal(boxes.nan_to_num(-1), before[1].nan_to_num(-1))
    assert all(m is None or torch.equal(m, b) for m, b in zip(masks, before[2]))


# ---- what does not fit ----


def refused(match, *args, **options):
    with pytest.raises(L2R2Error, match=match):
        make_views(*args, **options)


def test_boxes_that_do_not_fit_the_images():
    images, spec = [picture((20, 20))] * 2, ViewSpec(size=8)
    refused("3 boxes for 2 images", images, torch.zeros(3, 4), spec)
    refused(r"\[V, 4\]", images, torch.zeros(2, 5), spec)
    refused(r"\[V, 4\]", images, torch.zeros(4), spec)
    refused("no image", [], None, spec)
    refused("no image", images, torch.zeros(0, 4), spec, image_index=torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("index", [[0, 2], [-1, 0], [0], [0, 1, 1], [0.0, 1.0], [True, False], [[0], [1]]])
def test_an_index_that_does_not_fit(index):
    refused("image_index", [picture((20, 20))] * 2, torch.zeros(2, 4), ViewSpec(size=8), image_index=torch.tensor(index))


@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
@pytest.mark.parametrize("shape", [(20, 31), (30, 20), (1, 20, 30), (600,)])
def test_a_mask_of_another_size(fg, shape):
    refused(
        "Mask 1 is",
        [picture((20, 30))] * 2,
        torch.tensor([[2.0, 2, 9, 9], NONE]),
        ViewSpec(size=8, fg_mode=fg),
        masks=[None, torch.ones(shape, dtype=torch.bool)],
    )


def test_masks_must_be_one_a_box():
    refused("1 masks for 2 boxes", [picture((20, 30))] * 2, torch.zeros(2, 4), ViewSpec(size=8), masks=[None])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "F"])
def test_pil_images_of_other_modes(mode):
    refused("load_image", [Image.new(mode, (20, 20))], None, ViewSpec(size=8))


@pytest.mark.parametrize("shape, dtype", [((3, 20, 21), torch.uint8), ((20, 20, 3), torch.float32), ((20, 20), torch.uint8)])
def test_tensors_of_another_form(shape, dtype):
    refused("uint8", [torch.zeros(shape, dtype=dtype)], None, ViewSpec(size=8))


# ---- cut_batch ----

MEAN = tuple(f / 255 for f in FILL)  # so that the fill is exactly 0 when normalized


def batch(count=4, size=(40, 40)):
    images = [picture(size, i) for i in range(count)]
    x = torch.stack(images).permute(0, 3, 1, 2) / 255
    return images, (x - torch.tensor(MEAN)[:, None, None]) / 0.25


BATCH_BOXES = torch.tensor([[5.5, 3, 30, 36], [-4, 10, 20, 25], NONE, [33, 30, 60, 60]])


@pytest.mark.parametrize(
    "branch, fg", [("fg", "crop"), ("fg", "masked_crop"), ("fg", "masked"), ("bg", "crop"), ("bg", "masked")]
)
@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("square", [True, False])
def test_cut_batch_agrees_with_make_views(branch, fg, margin, square):
    spec = ViewSpec(size=40, fg_mode=fg, margin=margin, square=square, fill=FILL, mean=MEAN, std=(0.25,) * 3)
    images, x = batch()
    expected = make_views(images, BATCH_BOXES, spec, branches=(branch,))
    views, has_fg = cut_batch(x, BATCH_BOXES, spec, branch)
    assert torch.equal(has_fg, expected.has_fg)
    assert (views - getattr(expected, branch)).abs().max() < 1e-4
    assert torch.allclose(views[2], x[2], atol=1e-5)


@pytest.mark.parametrize("branch, fg", [("fg", "crop"), ("fg", "masked_crop"), ("fg", "masked"), ("bg", "crop")])
def test_gradients_reach_only_the_pixels_that_are_seen(branch, fg):
    _, x = batch()
    x.requires_grad_()
    views, has_fg = cut_batch(x, BATCH_BOXES, ViewSpec(size=40, fg_mode=fg, interpolation="bilinear"), branch)
    views.square().sum().backward()
    for row, box in enumerate(BATCH_BOXES.tolist()):
        seen = torch.ones(40, 40, dtype=torch.bool)
        if has_fg[row]:
            x0, y0, x1, y1 = window_of(box, (40, 40), 0.0)
            seen[:] = branch == "bg"
            seen[y0:y1, x0:x1] = branch == "fg"
        reached = (x.grad[row] != 0).any(0)
        assert not reached[~seen].any() and reached[seen].float().mean() > 0.9


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("branch", ["fg", "bg"])
def test_cut_batch_of_other_numbers_of_channels(channels, branch):
    _, x = batch()
    wide = x[:, [0, 1, 2, 0][:channels]]
    expected, _ = cut_batch(x, BATCH_BOXES, ViewSpec(), branch)
    views, has_fg = cut_batch(wide, BATCH_BOXES, ViewSpec(), branch)
    assert torch.allclose(views, expected[:, [0, 1, 2, 0][:channels]], atol=1e-5) and has_fg.shape == (4,)


def test_cut_batch_of_a_batch_that_is_not_square():
    x = torch.randn(2, 3, 24, 50)
    boxes = torch.tensor([[0.0, 0, 50, 24], [10, 5, 30, 20]])
    views, has_fg = cut_batch(x, boxes, ViewSpec(square=False), "fg")
    assert views.shape == x.shape and has_fg.all() and torch.allclose(views[0], x[0], atol=1e-5)
    expected = F.interpolate(x[1:, :, 5:20, 10:30], (24, 50), mode="bicubic", antialias=True)
    assert torch.allclose(views[1:], expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (4, 5), (4, 1, 4)])
def test_cut_batch_refuses_boxes_that_do_not_fit(shape):
    with pytest.raises(L2R2Error, match=r"\[4, 4\]"):
        cut_batch(torch.zeros(4, 3, 8, 8), torch.zeros(shape), ViewSpec(), "fg")

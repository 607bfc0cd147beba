"""Views at their own aspect ratio: their sizes, and that each is the view that would be cut alone."""

import itertools
import math
import re

import pytest
import torch
from l2r2_kernels import roi_views
from test_views import BRANCHES, NONE, picture

from l2r2_models import L2R2Error
from l2r2_models.images import LazyImage
from l2r2_models.views import ViewSpec, batch_views, cat_views, decode_patches, make_views, native_size, stack_views, view_map

BOXES = torch.tensor([[3.0, 4, 30, 20], NONE, [10.0, 5, 25, 33]])
SPEC = ViewSpec(size=32, patch=8, margin=0.1)


def images():
    return [picture((33, 47), 0), picture((50, 20), 1), picture((40, 40), 2)]


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (64, 16), (32, 8), (384, 16), (16, 16)])
def test_sizes_use_the_budget_and_keep_the_ratio(size, patch):
    most, side = (size // patch) ** 2, size // patch
    sides = [1, 2, 3, 7, 30, 100, 333, 640, 1000, 4000]
    for height, width in itertools.product(sides, sides):
        h, w = native_size(height, width, size, patch)
        rows, columns = h // patch, w // patch
        assert h % patch == w % patch == 0 and 1 <= rows * columns <= most
        assert max(h, w) <= 2 * size, "long images would make large batches"
        assert native_size(width, height, size, patch) == (w, h)
        if 1 / 4 <= height / width <= 4 and side >= 14:
            assert rows * columns > 0.9 * most and abs(math.log(rows / columns / (height / width))) < 0.15
    assert native_size(70, 70, size, patch) == (size, size)
    assert native_size(1, 10**6, size, patch) == native_size(1, 4, size, patch)


@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
def test_each_view_is_cut_alone_and_nan_lies_beyond_it(fg):
    masks = [None, None, torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) > 0.5]
    spec = ViewSpec(size=32, patch=8, margin=0.1, fg_mode=fg, bg="box", sizes={"fg": 48})
    views = make_views(images(), BOXES, spec, branches=BRANCHES, masks=masks)
    shapes = set()
    for i, image in enumerate(images()):
        one = make_views([image], BOXES[i : i + 1], spec, branches=BRANCHES, masks=masks[i : i + 1])
        for branch in BRANCHES:
            view, together = getattr(one, branch)[0], getattr(views, branch)[i]
            box = BOXES[i] if bool(views.has_fg[i]) else None
            assert tuple(view.shape[1:]) == view_map(branch, spec, tuple(image.shape[:2]), box).view_size
            assert not view.isnan().any() and torch.equal(together[:, : view.shape[1], : view.shape[2]], view)
            assert int(together.isnan().sum()) == together.numel() - view.numel()
            shapes.add(tuple(view.shape))
    assert len(shapes) > 3


def test_pixels_are_those_of_a_resize_to_that_size():
    views = make_views(images(), BOXES, SPEC, branches=("full", "fg"))
    image, (height, width) = images()[0], native_size(33, 47, 32, 8)
    expected, _ = roi_views(
        [image], torch.tensor([[0.0, 0, 47, 33]]), size=(height, width), square=False, interpolation="bicubic",
        mean=SPEC.mean, std=SPEC.std, fill=SPEC.fill,
    )  # fmt: skip
    assert torch.equal(views.full[0, :, :height, :width], expected[0])
    assert width > height


def test_images_with_several_boxes_and_images_of_one_size():
    boxes = torch.tensor([[3.0, 4, 30, 20], [1.0, 1, 9, 30]])
    views = make_views(images()[:1], boxes, SPEC, image_index=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(views.full[0], views.full[1]) and not views.full.isnan().any()
    assert views.fg.isnan().any() and views.fg.shape[0] == 2


def test_patches_of_a_file_have_the_size_of_the_view_of_the_whole_image():
    spec = ViewSpec(size=32, patch=8, decode="scaled")
    box = torch.tensor([[20.0, 30, 420, 131]])
    image = picture((299, 517))
    whole = make_views([image], box, spec)
    of_file = make_views([decode_patches(LazyImage(image), box, spec, ("full", "fg"))], box, spec)
    for branch in ("full", "fg"):
        a, b = getattr(whole, branch), getattr(of_file, branch)
        assert a.shape == b.shape and (a - b).abs().mean() < 0.3


def test_batches_of_views_of_several_sizes():
    a, b = torch.ones(3, 8, 16), torch.ones(3, 16, 8)
    stacked = stack_views([a, b])
    assert stacked.shape == (2, 3, 16, 16) and stacked[0, :, :8].isfinite().all() and stacked[0, :, 8:].isnan().all()
    assert torch.equal(cat_views([a[None], b[None]]).isnan(), stacked.isnan())
    assert torch.equal(stack_views([torch.tensor(True), torch.tensor(False)]), torch.tensor([True, False]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"patch": -1}, "patch must be 0 or the side of a patch"),
        ({"patch": True}, "patch must be 0 or the side of a patch"),
        ({"size": 40, "patch": 16}, "size must be a multiple of its patch of 16 pixels, e.g. 32; got 40"),
        ({"size": 32, "patch": 16, "sizes": {"fg": 50}}, "e.g. 48; got 50"),
        ({"size": 32, "patch": 16, "fg_mode": "tokens"}, 'fg_mode "tokens" needs square views'),
        ({"size": 32, "patch": 16, "mode": "pil"}, "must be square"),
    ],
)
def test_what_such_views_cannot_be(changes, why):
    with pytest.raises(L2R2Error, match=why):
        ViewSpec(**changes)


def test_the_spec_says_so_and_a_batch_is_refused():
    assert not SPEC.square and ViewSpec.from_dict(SPEC.to_dict()) == SPEC
    assert SPEC.size_words(["full", "fg"]) == "up to 16 patches of 8 x 8 pixels"
    with pytest.raises(L2R2Error, match=re.escape("are cut from images, not from a batch")):
        batch_views(torch.zeros(1, 3, 32, 32), BOXES[:1], SPEC, ("full", "fg"))

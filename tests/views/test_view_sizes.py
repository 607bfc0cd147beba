"""Views of a size of their own by branch, against views of one size cut branch by branch."""

import pytest
import torch
from test_views import BATCH_BOXES, BRANCHES, FILL, MEAN, NONE, batch, picture

from l2r2_models import L2R2Error
from l2r2_models.views import ViewSpec, batch_views, make_views, view_map
from l2r2_models.views.traceable import cut_in_graph

SIZES = {"full": 24, "fg": 40, "bg": 16}
BOXES = torch.tensor([[3.0, 4, 30, 20], NONE, [10.0, 5, 25, 33]])


def images():
    return [picture((33, 47), 0), picture((50, 20), 1), picture((40, 40), 2)]


@pytest.mark.parametrize("fg", ["crop", "masked_crop", "masked"])
@pytest.mark.parametrize("mode", ["float", "pil"])
def test_each_branch_is_cut_as_if_all_had_its_size(fg, mode):
    masks = [None, None, torch.rand(40, 40) > 0.5]
    spec = ViewSpec(size=24, sizes={"fg": 40, "bg": 16}, fg_mode=fg, mode=mode)
    views = make_views(images(), BOXES, spec, branches=BRANCHES, masks=masks)
    for branch, size in SIZES.items():
        alone = make_views(images(), BOXES, ViewSpec(size=size, fg_mode=fg, mode=mode), branches=(branch,), masks=masks)
        assert getattr(views, branch).shape[-2:] == (size, size)
        assert torch.equal(getattr(views, branch), getattr(alone, branch)), branch
        assert torch.equal(views.has_fg, alone.has_fg)


def test_sizes_that_are_equal_change_nothing():
    plain = make_views(images(), BOXES, ViewSpec(size=24), branches=BRANCHES)
    given = make_views(images(), BOXES, ViewSpec(size=96, sizes=dict.fromkeys(BRANCHES, 24)), branches=BRANCHES)
    assert all(torch.equal(getattr(plain, branch), getattr(given, branch)) for branch in BRANCHES)


def test_the_mask_of_a_masked_fg_has_the_size_of_the_full_view():
    spec = ViewSpec(size=96, sizes={"full": 24, "fg": 24}, fg_mode="late")
    views, plain = (make_views(images(), BOXES, s) for s in (spec, ViewSpec(size=24, fg_mode="late")))
    assert torch.equal(views.mask, plain.mask) and torch.equal(views.full, plain.full)


@pytest.mark.parametrize("branch", BRANCHES)
def test_positions_are_mapped_at_the_size_of_the_branch(branch):
    spec = ViewSpec(size=96, sizes=SIZES)
    for box in (None, torch.tensor([3.0, 4, 30, 20])):
        assert view_map(branch, spec, (33, 47), box) == view_map(branch, ViewSpec(size=SIZES[branch]), (33, 47), box)


def test_views_cut_in_a_graph_are_those_of_make_views():
    spec = ViewSpec(size=24, sizes={"fg": 40, "bg": 16})
    image, boxes = picture((33, 47)), torch.tensor([[3.0, 4, 30, 20], NONE])
    expected = make_views([image], boxes, spec, branches=BRANCHES, image_index=torch.zeros(2, dtype=torch.int64))
    views, _ = cut_in_graph(image, boxes, spec, BRANCHES)
    for branch, view in views.items():
        assert torch.allclose(view, getattr(expected, branch)[: len(view)], atol=1e-4), branch


@pytest.mark.parametrize("fg", ["crop", "masked"])
def test_views_of_a_normalized_batch_have_the_sizes_of_make_views(fg):
    spec = ViewSpec(size=40, sizes={"fg": 64, "bg": 20}, fg_mode=fg, fill=FILL, mean=MEAN, std=(0.25,) * 3)
    pixels, x = batch()
    expected = make_views(pixels, BATCH_BOXES, spec, branches=BRANCHES)
    views = batch_views(x, BATCH_BOXES, spec, BRANCHES)
    assert views["full"] is x
    for branch in BRANCHES:
        assert views[branch].shape == getattr(expected, branch).shape
        assert (views[branch] - getattr(expected, branch)).abs().max() < 1e-4, branch
    halved = batch_views(x[..., ::2, ::2], BATCH_BOXES / 2, spec, BRANCHES)
    assert {branch: halved[branch].shape[-1] for branch in BRANCHES} == {"full": 20, "fg": 32, "bg": 10}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"sizes": {"object": 96}}, 'Unknown branch "object" in the sizes of views; choose from full, fg, bg'),
        ({"sizes": {"fg": 0}}, "size for fg must be between 1 and 4096 pixels, got 0"),
        ({"sizes": {"fg": "96"}}, "size for fg must be between 1 and 4096"),
        ({"sizes": 96}, "sizes must be a mapping of names to values"),
        ({"sizes": {"full": 96}, "fg_mode": "tokens"}, "fg sees the full view, so their sizes must be equal"),
    ],
)
def test_sizes_that_are_refused(fields, why):
    with pytest.raises(L2R2Error, match=why):
        ViewSpec.from_dict(fields)


def test_sizes_are_stored():
    spec = ViewSpec(sizes=SIZES)
    assert ViewSpec.from_dict(spec.to_dict()) == spec != ViewSpec() and hash(spec) == hash(ViewSpec(sizes=SIZES))
    changing = dict(SIZES)
    given = ViewSpec(sizes=changing)
    changing["full"] = 8
    assert given == spec, "a spec does not change with the mapping it was made from"

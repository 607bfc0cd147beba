"""The object's mask on the page: strokes, what they change, and the way back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from app_cases import BOXES, photo, write_backgrounds
from explain_cases import write_spots

from l2r2_models import Explainer, L2R2Error, Predictor
from l2r2_models.app import markup
from l2r2_models.app.mask import Stroke, painted
from l2r2_models.app.studio import Photo, Studio
from l2r2_models.boxes.detections import Detections

BOTH = (20.0, 30.0, 200.0, 120.0)  # a box around both objects


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("edited")


@pytest.fixture(scope="module", params=["masked_crop", "masked", "late"])
def studio(folder, request):
    run = write_spots(folder / request.param, fg_mode=request.param, margin=0.0)
    return Studio(Explainer.from_pretrained(run, numbers=False), write_backgrounds(folder / f"{request.param}-grounds"))


@pytest.fixture
def seen(studio):
    return studio.write(Photo(photo(), "photo.png"), "20, 30, 200, 120")


def along(name, erase, brush=0.4):
    """A stroke through the middle of an object, wide enough for all of it."""
    x0, y0, x1, y1 = BOXES[name]
    return {"points": [[x / 240, (y0 + y1) / 2 / 160] for x in (x0, x1)], "brush": brush, "erase": erase}


def says(studio, photo):
    return studio.look(photo).answers["fg"][0].label


def test_fg_follows_the_mask_and_full_does_not(studio, seen):
    for erased, other in (("red", "blue"), ("blue", "red")):
        edited = studio.paint(seen, along(erased, True))
        look = studio.look(edited)
        assert look.answers["fg"][0].label == other and look.answers["full"][0].label == "green"
        assert studio.look(edited, saliency=True).maps
        back = studio.paint(edited, along(erased, False, brush=0.26))
        assert says(studio, studio.paint(back, along(other, True))) == erased


def test_predictions_are_those_for_a_mask_of_predict(studio, seen):
    edited = studio.paint(seen, along("red", True))
    given = Detections(torch.tensor([BOTH]), torch.ones(1), (160, 240), masks=edited.mask[None])
    wanted = Predictor.from_pretrained(studio.predictor.checkpoint.name)(photo(), given).objects[0]
    look = studio.look(edited)
    assert look.reason == wanted.reason
    assert [a.label for a in look.answers["fused"]] == [a.label for a in wanted.top]
    assert [a.score for a in look.answers["fused"]] == pytest.approx([a.score for a in wanted.top], abs=1e-4)


def test_reset_and_another_box_forget_the_strokes(studio, seen):
    edited = studio.paint(seen, along("red", True))
    assert studio.reset_mask(edited) == seen
    assert studio.write(edited, "20, 30, 80, 90").mask is None and studio.whole(edited).mask is None


def test_the_masks_of_a_localizer_are_used_and_come_back(studio, seen):
    only_blue, only_red = torch.zeros(2, 160, 240, dtype=torch.bool)
    only_blue[60:120, 140:200] = True
    only_red[30:90, 20:80] = True
    found = seen.with_boxes([BOTH, BOTH], [0.9, 0.8], [only_blue, only_red])
    assert says(studio, found) == "blue" and says(studio, studio.choose(found, 1)) == "red"
    painted_over = studio.paint(studio.paint(found, along("red", False)), along("blue", True))
    assert says(studio, painted_over) == "red" and says(studio, studio.reset_mask(painted_over)) == "blue"


def test_what_is_painted_without_a_box_is_the_object(studio, seen):
    drawn = studio.paint(studio.whole(seen), along("blue", False, brush=0.1))
    assert says(studio, drawn) == "blue" and not drawn.boxes
    assert drawn.box == pytest.approx((128, 78, 212, 102), abs=1)
    with pytest.raises(L2R2Error, match="nothing to erase; draw a box"):
        studio.paint(studio.whole(seen), along("blue", True))
    assert studio.reset_mask(drawn).box is None


def test_painting_outside_of_the_box_grows_it(studio, seen):
    red = studio.write(seen, "20, 30, 80, 90")
    grown = studio.paint(red, along("blue", False, brush=0.1))
    assert grown.box == pytest.approx((20, 30, 212, 102), abs=1) and studio.reset_mask(grown).box == BOXES["red"]
    inside = studio.write(seen, "20.4, 30.6, 80.2, 90")
    assert studio.paint(inside, along("red", True, brush=0.1)).box == inside.box  # not rounded to whole pixels
    assert "left:8.333%;top:18.750%;width:80" in markup.stage(grown, uses_mask=True)


def test_an_empty_mask_is_answered_by_full(studio, seen):
    nothing = studio.paint(seen, {"points": [[0, 0.5], [1, 0.5]], "brush": 1.0, "erase": True})
    look = studio.look(nothing)
    assert not nothing.kept.any() and set(look.answers) == {"full", "fused"} and "mask" in look.reason
    with pytest.raises(L2R2Error, match="paint it first"):
        studio.look_elsewhere(replace(nothing, background=torch.zeros(9, 9, 3, dtype=torch.uint8)))


def test_only_the_pixels_of_the_mask_move_to_another_background(studio, seen):
    edited = studio.put_on(studio.paint(seen, along("red", True)), 0)
    moved = studio.look_elsewhere(edited)
    pixels, before = np.asarray(moved.image), np.asarray(photo())
    assert (pixels[40:80, 30:70] == pixels[0, 0]).all()
    assert (pixels[70:110, 150:190] == before[70:110, 150:190]).all()
    assert moved.answers["fg"][0].label == "blue"
    assert "pixels of the mask are moved" in markup.elsewhere(moved, studio.look(edited), edited)


def test_the_mask_is_shown_where_it_is_used(studio, seen, folder):
    assert 'class="mask"' in markup.stage(seen, uses_mask=studio.uses_mask) and studio.uses_mask
    crop = Studio(
        Explainer.from_pretrained(write_spots(folder / f"crop-{studio.predictor.model.view_spec.fg_mode}"), numbers=False)
    )
    assert not crop.uses_mask and 'class="mask"' not in markup.stage(seen, uses_mask=crop.uses_mask)
    with pytest.raises(L2R2Error, match="does not use masks; draw a box"):
        crop.paint(seen, along("red", True))


@pytest.mark.parametrize(
    "change",
    [
        {"points": []},
        {"points": [[0.5, 0.5]] * 10_001},
        {"points": [[0.5]]},
        {"points": [[0.5, float("nan")]]},
        {"points": [[0.5, 1.5]]},
        {"points": "0.5"},
        {"brush": 1e9},
        {"brush": None},
        {"erase": "no"},
    ],
)
def test_a_stroke_that_is_none_is_one_sentence(change):
    for sent in ({**along("red", False), **change}, None, [0, 0, 1, 1], {}):
        with pytest.raises(L2R2Error, match=r"^That stroke cannot be read; paint on the photo again\.$"):
            Stroke.read(sent)


def test_a_stroke_is_as_wide_as_its_brush_and_round():
    mask = painted(torch.zeros(100, 200, dtype=torch.bool), Stroke(((0.25, 0.5), (0.75, 0.5)), 0.1, False))
    assert mask[:, 100].sum() == pytest.approx(20, abs=1) and mask[50].sum() == pytest.approx(120, abs=1)
    assert mask[50, 41] and not mask[41, 41]
    dot = painted(mask, Stroke(((0.5, 0.5),), 0.1, True))
    assert (mask & ~dot).sum() == pytest.approx(np.pi * 100, rel=0.06) and not (dot & ~mask).any()

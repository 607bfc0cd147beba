"""LocalizerSpec strings, the controls, boxes from a file, and the postprocessing of all boxes."""

import json

import pytest
import torch
from PIL import Image

from l2r2_models.errors import L2R2Error
from l2r2_models.localize import LocalizerSpec, create_localizer
from l2r2_models.localize.base import tidy

IMAGES = [Image.new("RGB", (60, 40)), Image.new("RGB", (10, 30))]


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "owlv2:a/b?prompt=a mushroom&prompt=50%25 gray %26 red&threshold=0.3",
        "boxes:C:/x y/b.json",
        "ncut:runs/a+b",
        "boxes:a%3Fb 50%25.json?masks=sam:a/b",
    ],
)
def test_a_spec_survives_as_text(text):
    spec = LocalizerSpec.parse(text)
    assert LocalizerSpec.parse(str(spec)) == spec


def test_specs_are_canonical():
    assert str(create_localizer("center?share=0.50").spec) == "center"
    assert str(create_localizer("center?share=0.25").spec) == "center?share=0.25"
    assert LocalizerSpec.parse("owlv2:x?prompt=b&prompt=a").options == {"prompt": ("b", "a")}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("middle", 'Unknown localizer "middle"; choose from camera-trap, prompt, owlv2'),
        ("", "does not name a localizer"),
        ("center?share", "write option=value pairs joined by &"),
        ("boxes:a?b.json", "write a ? in a name as %3F"),
        ("center?share=2", 'share must be a number between 0.01 and 1, got "2"'),
        ("center?share=nan", "share must be"),
        ("center?share=0.2&share=0.3", "2 values for share; give one"),
        ("center?size=3", "has no option size; its options are: share"),
        ("full:x", "takes no source after its name"),
        ("boxes", "needs a box file"),
        ("boxes:nowhere.json", "nowhere.json: no such box file"),
    ],
)
def test_specs_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(L2R2Error, match=message.replace("?", r"\?")):
        create_localizer(spec)


@pytest.mark.parametrize("device", ["qqq", "cuda:99"])
def test_a_device_that_is_not_there_is_a_sentence(device):
    with pytest.raises(L2R2Error, match=f'The device "{device}" cannot be used'):
        create_localizer("full", device=device)


def test_a_file_given_as_a_localizer_is_recognized(tmp_path):
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(L2R2Error, match="If that is a file, write"):
        create_localizer(str(tmp_path / "b.json"))


def test_the_controls():
    assert [d.boxes.tolist() for d in create_localizer("full")(IMAGES)] == [[[0, 0, 60, 40]], [[0, 0, 10, 30]]]
    assert [d.boxes.tolist() for d in create_localizer("center")(IMAGES)] == [[[15, 10, 45, 30]], [[2.5, 7.5, 7.5, 22.5]]]
    assert create_localizer("full")([]) == []
    with pytest.raises(L2R2Error, match="takes no prompt"):
        create_localizer("full")(IMAGES, prompts=["a", "b"])


def test_boxes_of_a_file_are_found_by_name(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"x/1.png": [[-5, 0, 10, 100], [70, 0, 80, 10]], "x/3.png": []}))
    localizer = create_localizer(f"boxes:{tmp_path / 'b.json'}")
    first, second = localizer(IMAGES, names=["data/x/1.png", "data/x/2.png"])
    assert first.boxes.tolist() == [[0, 0, 10, 40]] and len(second) == 0  # clipped; those outside and strangers have none
    (tmp_path / "a?b.json").write_text((tmp_path / "b.json").read_text())
    assert len(create_localizer(f"boxes:{tmp_path}/a%3Fb.json").table.entries) == 2
    with pytest.raises(L2R2Error, match="pass files, not images"):
        localizer(IMAGES)


def test_tidy_thresholds_clips_drops_and_suppresses():
    nan = float("nan")
    inside, outside = [[0, 0, 10, 10], [1, 0, 11, 10], [-5, -5, 4, 4]], [[50, 50, 60, 60], [5, 5, 5, 9], [0, 0, nan, 5]]
    boxes = torch.tensor([*inside, *outside, [20, 0, 30, 9]])
    scores = torch.tensor([0.8, 0.9, 0.5, 0.99, 0.99, 0.99, 0.1])
    found = tidy(boxes, scores, (40, 40), list("abcdefg"), threshold=0.2, nms_iou=0.5)
    assert found.labels == ("b", "c") and found.boxes.tolist() == [[1, 0, 11, 10], [0, 0, 4, 4]]
    assert tidy(boxes, scores, (40, 40), threshold=0.2, max_boxes=1).scores.tolist() == pytest.approx([0.9])
    scores[1] = nan
    assert tidy(boxes, scores, (40, 40), list("abcdefg"), threshold=0.2, nms_iou=0.5).labels == ("a", "c")
    with pytest.raises(L2R2Error, match="all scores of the localizer are NaN; try dtype=float32"):
        tidy(boxes, scores * nan, (40, 40))
    assert len(tidy(torch.zeros(0, 4), torch.zeros(0), (40, 40))) == 0

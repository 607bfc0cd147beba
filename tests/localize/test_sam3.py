"""SAM 3 by prompt: everything around the network, on a tiny random one loaded like a real one."""

import subprocess
import sys

import pytest
import torch
from conftest import sentence
from hub_double import HubDouble

from l2r2_models.boxes.read import read_boxes
from l2r2_models.errors import L2R2Error
from l2r2_models.localize import LocalizerSpec, create_localizer
from l2r2_models.localize.presets import license_of

EVERYTHING = "threshold=0&nms=1&max_boxes=1000"


def sam3(tiny, options=""):
    return create_localizer(f"sam3:{tiny('sam3')}?{options}", device="cpu")


def same(a, b):
    assert len(a) == len(b) and a.labels == b.labels
    torch.testing.assert_close(a.boxes, b.boxes, atol=1e-2, rtol=0)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=0)
    assert (a.masks != b.masks).float().mean() < 1e-3  # a pixel at 0.5 may fall to either side


def by_transformers(localizer, image, prompt, threshold=0.0):
    """What transformers' own postprocessing keeps, best first."""
    processor, model = localizer.network.processor, localizer.network.model
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        out = model(**inputs)
    sizes = [(image.height, image.width)]
    (found,) = processor.post_process_instance_segmentation(out, threshold=threshold, target_sizes=sizes)
    order = found["scores"].argsort(descending=True, stable=True)
    return found["boxes"][order], found["scores"][order], found["masks"][order].bool()


def test_boxes_scores_and_masks_are_those_of_transformers(tiny, pictures):
    localizer = sam3(tiny, f"prompt=bird&{EVERYTHING}")
    for image in pictures:
        (found,) = localizer([image])
        boxes, scores, masks = by_transformers(localizer, image, "bird")
        boxes = boxes.clamp(min=0).minimum(torch.tensor([image.width, image.height] * 2))
        usable = (boxes[:, 2:] > boxes[:, :2]).all(1)
        assert len(found) == int(usable.sum()) > 2 and set(found.labels) == {"bird"}
        torch.testing.assert_close(found.boxes, boxes[usable], atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, scores[usable], atol=1e-5, rtol=0)
        assert found.masks.dtype == torch.bool and (found.masks != masks[usable]).float().mean() < 1e-3
        assert 0 < found.masks.float().mean() < 1


def test_the_threshold_overlap_and_number_of_boxes_take_their_masks_with_them(tiny, pictures):
    (everything,) = sam3(tiny, f"prompt=bird&{EVERYTHING}")(pictures[1:2])
    level = everything.scores[2].item() - 1e-7
    (kept,) = sam3(tiny, f"prompt=bird&threshold={level}&nms=1")(pictures[1:2])
    same(kept, everything.select(torch.arange(3)))
    (two,) = sam3(tiny, "prompt=bird&threshold=0&nms=1&max_boxes=2")(pictures[1:2])
    same(two, everything.select(torch.arange(2)))
    (apart,) = sam3(tiny, "prompt=bird&threshold=0&nms=0.3")(pictures[1:2])
    assert 0 < len(apart) < len(everything)
    for box, mask in zip(apart.boxes, apart.masks):
        position = (everything.boxes - box).abs().amax(1).argmin()
        assert torch.equal(everything.masks[position], mask)
    (none,) = sam3(tiny, "prompt=bird&threshold=1")(pictures[1:2])
    assert len(none) == 0 and none.masks.shape == (0, 90, 30)


def test_several_prompts_are_searched_for_one_by_one(tiny, pictures):
    (found,) = sam3(tiny, f"prompt=bird&prompt=red square&{EVERYTHING}")(pictures[:1])
    for prompt in ("bird", "red square"):
        (alone,) = sam3(tiny, f"prompt={prompt}&{EVERYTHING}")(pictures[:1])
        same(found.select(torch.tensor([label == prompt for label in found.labels])), alone)


def test_batches_prompts_of_each_image_and_one_encoding_for_all_prompts(tiny, pictures, monkeypatch):
    localizer = sam3(tiny, EVERYTHING)
    asked = [["bird", "insect"], ["insect", "a"], ["red", "bird"], ["animal", "bird"]]
    alone = [[localizer([image], prompts=[p])[0] for p in prompts] for image, prompts in zip(pictures, asked)]
    seen = []
    encode = localizer.network.model.vision_encoder.forward
    monkeypatch.setattr(
        localizer.network.model.vision_encoder, "forward", lambda pixels, **k: seen.append(len(pixels)) or encode(pixels, **k)
    )
    for found, expected in zip(localizer.by_prompt(pictures, asked), alone):
        for a, b in zip(found, expected):
            same(a, b)
    assert seen == [4]
    with pytest.raises(L2R2Error, match="sam3 needs a prompt"):
        localizer(pictures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("prompt=", "has an empty prompt"),
        ("prompt=bird&threshold=2", "threshold must be a number between 0 and 1"),
        ("prompt=abcdefghijklmnopqrstuvwxyzabcdefgh", "tokens; sam3 takes at most 32"),
    ],
)
def test_what_it_cannot_read_is_refused(tiny, options, message):
    with pytest.raises(L2R2Error, match=message):
        sam3(tiny, options)


def test_nan_is_never_a_box(tiny, pictures):
    localizer = sam3(tiny, "prompt=bird")
    with torch.no_grad():
        for parameter in localizer.network.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(L2R2Error, match="all scores of the localizer are NaN"):
        localizer(pictures[:1])


def test_the_command_writes_the_masks(tiny, dataset, tmp_path, l2r2):
    spec = f"sam3:{tiny('sam3')}?threshold=0"
    done = l2r2("localize", dataset, "--localizer", spec, "--prompt", "bird", "-o", tmp_path / "b.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = read_boxes(tmp_path / "b.json").find("images/test_000.png").detections((40, 60), "test_000.png")
    assert len(found) and found.masks.shape == (len(found), 40, 60) and set(found.labels) == {"bird"}


def test_gated_weights_that_cannot_be_had_are_one_sentence(dataset, tmp_path, l2r2):
    command = ["localize", dataset, "--localizer", "sam3:facebook/sam3", "--prompt", "bird", "-o", tmp_path / "b.json"]
    offline = sentence(l2r2(*command))
    assert "weights are gated: accept the license at https://huggingface.co/facebook/sam3 and log in" in offline
    with HubDouble().running() as hub:
        hub.add("org/gated", {"config.json": b'{"model_type": "owlv2"}'}, gated=True)
        command[3] = "owlv2:org/gated"
        done = subprocess.run(
            [sys.executable, "-m", "l2r2_cli", *map(str, command)],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
        )
    assert "org/gated: cannot be downloaded; its weights are gated: accept" in sentence(done)
    assert license_of(LocalizerSpec.parse("sam3:facebook/sam3")) == "other (SAM License)"

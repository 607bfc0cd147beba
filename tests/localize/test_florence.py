"""Florence-2, which writes boxes as text: everything around the network, on a tiny random one loaded like real ones."""

import pytest
import torch
from conftest import sentence

from l2r2_models.errors import L2R2Error
from l2r2_models.localize import LocalizerSpec, create_localizer
from l2r2_models.localize.florence import TASK
from l2r2_models.localize.presets import license_of

EVERYTHING = "nms=1&max_boxes=1000"


def florence(tiny, options=""):
    return create_localizer(f"florence2:{tiny('florence2')}?{options}", device="cpu")


def same(a, b):
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and a.labels == b.labels


def by_transformers(localizer, image, prompt):
    """The boxes of transformers' own generation and postprocessing, clipped, those with a pixel."""
    processor, model = localizer.network.processor, localizer.network.model
    inputs = processor(text=TASK + prompt, images=image, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=95)
    (text,) = processor.batch_decode(tokens, skip_special_tokens=False)
    found = processor.post_process_generation(text=text, task=TASK, image_size=image.size)[TASK]
    boxes = torch.tensor(found["bboxes"], dtype=torch.float32).reshape(-1, 4)
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def test_boxes_are_those_of_transformers_in_the_order_in_which_they_were_written(tiny, pictures):
    localizer = florence(tiny, f"prompt=bird&{EVERYTHING}")
    counts = []
    for image in pictures:
        (found,) = localizer([image])
        theirs = by_transformers(localizer, image, "bird")
        assert torch.equal(found.boxes, theirs)
        assert found.scores.tolist() == [1.0] * len(theirs) and set(found.labels) <= {"bird"}
        counts.append(len(theirs))
    assert max(counts) > 2


def test_several_prompts_are_requests_of_their_own(tiny, pictures):
    both = florence(tiny, f"prompt=bird&prompt=red square&{EVERYTHING}")
    for image, found in zip(pictures, both(pictures)):
        each = [by_transformers(both, image, prompt) for prompt in ("bird", "red square")]
        assert torch.equal(found.boxes, torch.cat(each))
        assert found.labels == ("bird",) * len(each[0]) + ("red square",) * len(each[1])


def test_batches_and_prompts_of_each_image(tiny, pictures):
    localizer = florence(tiny, EVERYTHING)
    prompts = ["bird", "red square", "insect", "bird"]
    together = localizer(pictures, prompts=prompts)
    assert any(len(found) for found in together)
    for image, prompt, found in zip(pictures, prompts, together):
        same(found, localizer([image], prompts=[prompt])[0])
    top_k = localizer.by_prompt(pictures[:2], [["bird", "insect"], ["insect", "a"]])
    same(top_k[0][1], localizer(pictures[:1], prompts=["insect"])[0])
    with pytest.raises(L2R2Error, match="florence2 needs a prompt"):
        localizer(pictures)


def test_a_box_and_a_polygon_written_by_hand(tiny, pictures, monkeypatch):
    localizer = florence(tiny, "prompt=bird")
    tokenizer = localizer.network.processor.tokenizer
    written = {
        "</s><s>bird<loc_100><loc_200><loc_500><loc_800></s>": [[6, 8, 30, 32]],  # of 60 x 40 pixels and 1000 bins
        "</s><s>bird<poly><loc_100><loc_200><loc_500><loc_400><loc_300><loc_800></poly></s>": [[6, 8, 30, 32]],
        "</s><s>bird</s>": [],  # nothing found
        "</s><s>bird<loc_100><loc_200><loc_500></s>": [],  # cut off
    }
    for text, expected in written.items():
        tokens = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        monkeypatch.setattr(localizer.network.model, "generate", lambda tokens=tokens, **inputs: tokens)
        (found,) = localizer(pictures[:1])
        assert found.boxes.tolist() == expected, text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("prompt=", "has an empty prompt"),
        ("prompt=bird&threshold=0.5", "has no option threshold"),
        ("prompt=<OD>", "starts a command of Florence-2"),
        (f"prompt={'bird ' * 30}", "is too long for florence2"),
    ],
)
def test_what_it_cannot_read_is_refused(tiny, options, message):
    with pytest.raises(L2R2Error, match=message):
        florence(tiny, options)


def test_nan_is_never_an_image_without_objects(tiny, pictures):
    localizer = florence(tiny, "prompt=bird")
    with torch.no_grad():
        for parameter in localizer.network.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(L2R2Error, match="all scores of the localizer are NaN"):
        localizer(pictures[:1])


def test_the_command_finds_and_records(tiny, dataset, tmp_path, l2r2):
    spec = f"florence2:{tiny('florence2')}"
    missing = l2r2("localize", dataset, "--localizer", spec, "-o", tmp_path / "b.json", "--device", "cpu")
    assert "florence2 needs a prompt" in sentence(missing)
    done = l2r2("localize", dataset, "--localizer", spec, "--prompt", "bird", "-o", tmp_path / "b.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert license_of(LocalizerSpec.parse("florence2:florence-community/Florence-2-base?prompt=bird")) == "mit"

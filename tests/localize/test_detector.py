"""Detectors with fixed classes, on tiny random ones, against the postprocessing of their own image processors."""

import pytest
import torch
from tiny_models import CLASSES

from l2r2_models.errors import L2R2Error
from l2r2_models.localize import create_localizer
from l2r2_models.localize.detector import SIGMOID, SOFTMAX

KINDS = ["detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr"]
EVERYTHING = "threshold=0&nms=1&max_boxes=1000"


def create(tiny, kind, options=EVERYTHING):
    return create_localizer(f"detr:{tiny(kind)}?{options}", device="cpu")


def theirs(localizer, image, ignored=()):
    """What transformers finds without the ignored classes, best first: scores, labels and boxes clipped to the image."""
    processor, model = localizer.network.processor, localizer.network.model
    with torch.inference_mode():
        out = model(**processor(images=image, return_tensors="pt"))
        out.logits[..., list(ignored)] = float("-inf")
    size = torch.tensor([[image.height, image.width]])
    (found,) = processor.post_process_object_detection(out, threshold=-1.0, target_sizes=size)
    order = found["scores"].argsort(descending=True)
    limit = torch.tensor([image.width, image.height] * 2)
    return found["scores"][order], found["labels"][order].tolist(), found["boxes"][order].clamp(min=0).minimum(limit)


def check(ours, scores, labels, boxes):
    """Our boxes down to their lowest score are their boxes, each with its best label."""
    lowest = scores.min()
    rows = [(float(s), CLASSES[k], b) for s, k, b in zip(scores, labels, boxes) if ((b[2:] - b[:2]) > 0).all()]
    best = {tuple(b.round(decimals=2).tolist()): row for row in reversed(rows) for b in [row[2]]}
    want = sorted(best.values(), key=lambda row: -row[0])
    kept = ours.above(float(lowest) - 1e-6)
    assert len(want) > 2 and len(kept) == len(want)
    for i, (score, label, box) in enumerate(want):
        assert kept.scores[i] == pytest.approx(score, abs=1e-5) and kept.labels[i] == label
        torch.testing.assert_close(kept.boxes[i], box, atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_what_transformers_itself_finds(tiny, pictures, kind):
    localizer = create(tiny, kind)
    for image in pictures[:3]:
        (ours,) = localizer([image])
        check(ours, *theirs(localizer, image))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "detr"])  # its softmax is in the next test
def test_named_classes_are_the_only_ones_that_count(tiny, pictures, kind):
    best = create(tiny, kind)(pictures[:1])[0].labels[0]
    others = [name for name in CLASSES if name != best][:2]  # also where another class of the same box scores higher
    localizer = create(tiny, kind, f"classes={', '.join(others).upper()}&{EVERYTHING}")
    (ours,) = localizer(pictures[:1])
    check(ours, *theirs(localizer, pictures[0], [i for i, name in enumerate(CLASSES) if name not in others]))
    assert set(ours.labels) <= set(others)


def test_the_score_of_a_named_class_is_its_share_of_all_classes(tiny, pictures):
    softmax = create(tiny, "detr", f"classes=dog&{EVERYTHING}")
    with torch.inference_mode():
        logits = softmax.network.model(**softmax.network.processor(images=pictures[0], return_tensors="pt")).logits[0]
    (ours,) = softmax(pictures[:1])
    distance = (ours.scores[:, None] - logits.softmax(-1)[:, 2]).abs().amin(1)
    assert len(ours) > 2 and distance.max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_batches_find_what_single_images_do(tiny, pictures, kind):
    localizer = create(tiny, kind)
    for image, found in zip(pictures, localizer(pictures)):
        (alone,) = localizer([image])
        assert len(alone) == len(found) > 0
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-3, rtol=0)  # rounding differs between batch sizes
        torch.testing.assert_close(found.boxes, alone.boxes, atol=5e-2, rtol=0)


def test_limits_of_the_options(tiny, pictures):
    (everything,) = create(tiny, "detr")(pictures[:1])
    level = everything.scores[len(everything) // 2].item()
    assert len(create(tiny, "detr", f"threshold={level:.6f}&nms=1&max_boxes=1000")(pictures[:1])[0]) < len(everything)
    assert len(create(tiny, "detr", "threshold=0&nms=1&max_boxes=2")(pictures[:1])[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("classes=brid,dog", 'the detector has no class "brid"; close matches: Bird.'),
        ("classes=xyz", 'the detector has no class "xyz"; its classes are: person, Bird, dog, traffic light.'),
        ("classes=dog,", "classes must be names of the detector's classes, separated by commas"),
        ("prompt=dog", "has no option prompt; its options are: classes, threshold"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, options, message):
    with pytest.raises(L2R2Error) as refused:
        create(tiny, "detr", options)
    assert message in str(refused.value)


def test_other_networks_and_prompts_are_refused(tiny, pictures):
    with pytest.raises(L2R2Error, match="is a model of type owlv2; use one of type"):
        create(tiny, "owlv2")
    with pytest.raises(L2R2Error, match="was trained without focal loss"):
        create(tiny, "rt_detr_v2, other loss")
    with pytest.raises(L2R2Error, match="takes no prompt"):
        create(tiny, "detr")(pictures[:1], prompts=["dog"])


def test_every_family_is_one_that_transformers_has():
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as known

    assert {*SIGMOID, *SOFTMAX} <= set(known)


def test_box_files_name_the_detector_and_its_weights(tiny, dataset, tmp_path, l2r2):
    from l2r2_models.boxes.read import read_boxes

    spec = f"detr:{tiny('rt_detr_v2')}?classes=bird&threshold=0"
    done = l2r2("localize", dataset, "--localizer", spec, "-o", tmp_path / "boxes.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    file = read_boxes(tmp_path / "boxes.json")
    assert file.info["localizer"] == spec and file.info["weights"]
    assert any(len(entry.boxes) for entry in file.entries.values())

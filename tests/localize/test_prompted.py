"""Prompted detectors: everything around the network, on tiny random ones loaded like real ones."""

import pytest
import torch
from torch.nn.functional import normalize
from torchvision.ops import box_iou

from l2r2_models.errors import L2R2Error
from l2r2_models.localize import create_localizer
from l2r2_models.localize.prompted import _labels

EVERYTHING = "threshold=0&nms=1&max_boxes=1000"
DINOS = ["grounding-dino", "mm-grounding-dino"]
KINDS = ["owlv2", *DINOS, "omdet-turbo"]


def spec(tiny, kind, options):
    return f"{'grounding-dino' if kind in DINOS else kind}:{tiny(kind)}?{options}"


def same(a, b, atol=1e-3):
    assert len(a) == len(b) and a.labels == b.labels and a.image_size == b.image_size
    torch.testing.assert_close(a.boxes, b.boxes, atol=atol, rtol=0)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)


def usable(boxes, image):
    """Clipped to the image, at least a pixel."""
    width, height = image.size
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    return boxes, ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_is_what_transformers_itself_finds(tiny, pictures, kind):
    localizer = create_localizer(spec(tiny, kind, f"prompt=bird&{EVERYTHING}"), device="cpu")
    processor, model = localizer.network.processor, localizer.network.model
    for image in pictures:
        inputs = processor(text=[["bird"]], images=image, return_tensors="pt")
        with torch.inference_mode():
            out = model(**inputs)
        sizes = torch.tensor([[image.height, image.width]])
        (theirs,) = processor.post_process_grounded_object_detection(out, threshold=0.0, target_sizes=sizes)
        (ours,) = localizer([image])
        assert set(ours.labels) == {"bird"}
        clipped, inside = usable(theirs["boxes"], image)
        for box, score in zip(ours.boxes, ours.scores):  # every one of ours is one of theirs
            distance = (clipped - box).abs().amax(1) + (theirs["scores"] - score).abs()
            assert distance[inside].min() < 1e-3
        assert len(ours) <= int(inside.sum()) and ours.scores[0] == pytest.approx(theirs["scores"][inside].max().item(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_find_what_single_images_do(tiny, pictures, kind):
    localizer = create_localizer(spec(tiny, kind, "prompt=bird&prompt=red square&threshold=0.01"), device="cpu")
    together = localizer(pictures)
    assert any(len(found) for found in together)
    for image, found in zip(pictures, together):
        same(found, localizer([image])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_each_image_are_searched_in_that_image_only(tiny, pictures, kind):
    localizer = create_localizer(spec(tiny, kind, EVERYTHING), device="cpu")
    prompts = ["bird", "red square", "insect", "bird"]
    for image, prompt, found in zip(pictures, prompts, localizer(pictures, prompts=prompts)):
        same(found, create_localizer(spec(tiny, kind, f"prompt={prompt}&{EVERYTHING}"), device="cpu")([image])[0])
        assert set(found.labels) == {prompt}
    with pytest.raises(L2R2Error, match="needs a prompt"):
        localizer(pictures)
    with pytest.raises(L2R2Error, match="got an empty prompt for an image"):
        localizer(pictures, prompts=["bird", " .", "a", "b"])


def test_several_prompts_of_owlv2_are_the_mean_of_their_directions(tiny, pictures):
    def search(options):
        return create_localizer(spec(tiny, "owlv2", f"{options}&{EVERYTHING}"), device="cpu")

    one, two, three = (search("&".join(f"prompt={p}" for p in names)) for names in (["bird"], ["bird", "animal"], ["bird"] * 3))
    for a, b in zip(one(pictures), three(pictures)):
        assert torch.allclose(a.scores, b.scores, atol=1e-5)  # the mean of equal directions is that direction
    model, processor = two.network.model, two.network.processor
    with torch.inference_mode():
        tokens = processor(text=[["bird", "animal"]], return_tensors="pt")
        texts = model.owlv2.get_text_features(**tokens).pooler_output
        mean = normalize(normalize(texts, dim=-1).mean(0), dim=-1)
        features = model.image_embedder(processor(images=pictures[0], return_tensors="pt")["pixel_values"])[0].flatten(1, 2)
        scores = model.class_predictor(features, mean[None, None])[0].sigmoid().flatten().sort(descending=True).values
    found = two(pictures[:1])[0]
    assert found.scores[0] == pytest.approx(scores[0].item(), abs=1e-4) and set(found.labels) == {""}


def test_top_k_prompts_encode_each_image_once(tiny, pictures, monkeypatch):
    localizer = create_localizer(spec(tiny, "owlv2", EVERYTHING), device="cpu")
    asked = [["bird", "insect"], ["insect", "a"], ["red", "bird"], ["animal", "bird"]]
    alone = [[localizer([i], prompts=[p])[0] for p in prompts] for i, prompts in zip(pictures, asked)]
    seen = []
    look = localizer.network.model.image_embedder
    monkeypatch.setattr(localizer.network.model, "image_embedder", lambda pixels: seen.append(len(pixels)) or look(pixels))
    for found, expected in zip(localizer.by_prompt(pictures, asked), alone):
        for a, b in zip(found, expected):
            same(a, b)
    assert seen == [4]


def test_several_prompts_of_grounding_dino_are_one_text_and_each_box_names_its_own(tiny, pictures):
    localizer = create_localizer(spec(tiny, "grounding-dino", f"prompt=Bird&prompt=red square&{EVERYTHING}"), device="cpu")
    processor, model = localizer.network.processor, localizer.network.model
    inputs = processor(text="bird. red square.", images=pictures[0], return_tensors="pt")
    with torch.inference_mode():
        scores = model(**inputs).logits[0].sigmoid()  # [boxes, tokens]: [CLS] bird . red square . [SEP]
    (found,) = localizer(pictures[:1])
    best = scores.amax(1).argmax()
    assert found.scores[0] == pytest.approx(scores.max().item(), abs=1e-4)
    assert found.labels[0] == ("Bird" if scores[best, 1] >= scores[best, 3:5].max() else "red square")
    planted = torch.tensor([[0.9, 0.1, 0.9, 0.3, 0.2, 0.9, 0.9], [0.9, 0.5, 0.9, 0.1, 0.4, 0.9, 0.9]])
    tokens, query = inputs["input_ids"][0], ("Bird", "red square")
    assert _labels(planted, tokens, processor.tokenizer, query) == ["red square", "Bird"]
    assert _labels(planted, tokens, processor.tokenizer, (*query, "insect")) == ["", ""]


def test_several_prompts_of_omdet_turbo_are_classes_and_each_box_has_its_best(tiny, pictures):
    names = ["bird", "red square", "insect"]
    prompts = "&".join(f"prompt={name}" for name in names)
    localizer = create_localizer(spec(tiny, "omdet-turbo", f"{prompts}&{EVERYTHING}"), device="cpu")
    processor, model = localizer.network.processor, localizer.network.model
    inputs = processor(text=[names], images=pictures[0], return_tensors="pt")
    with torch.inference_mode():
        out = model(**inputs)
    sizes = [(pictures[0].height, pictures[0].width)]
    (theirs,) = processor.post_process_grounded_object_detection(out, [names], threshold=0, nms_threshold=1, target_sizes=sizes)
    (ours,) = localizer(pictures[:1])
    best = theirs["scores"].argmax()
    assert ours.labels[0] == theirs["text_labels"][best] and ours.scores[0] == pytest.approx(
        theirs["scores"][best].item(), abs=1e-4
    )
    assert set(ours.labels) <= set(names)
    short, long = ["bird"], ["red square insect mushroom"] * 4
    with pytest.raises(L2R2Error, match="tokens; omdet-turbo takes at most 77, so shorten"):
        localizer.search(pictures[:2], [[tuple(short)], [tuple(long)]])


@pytest.mark.parametrize("kind", KINDS)
def test_planted_boxes_come_back_in_pixels_of_images_that_are_not_square(tiny, pictures, monkeypatch, kind):
    """Where the network says "half of the input, in its middle"; OWLv2's input is padded to a square below and right."""
    localizer = create_localizer(spec(tiny, kind, "prompt=bird&threshold=0"), device="cpu")
    model = localizer.network.model
    planted = torch.tensor([0.5, 0.5, 0.5, 0.5])
    if kind == "owlv2":
        monkeypatch.setattr(model, "box_predictor", lambda features, grid: planted.expand(*features.shape[:2], 4))
        expected = [[15, 15, 45, 40], [22.5, 22.5, 30, 67.5]]  # of 60x60 and 90x90, clipped to 60x40 and 30x90
    else:
        forward = model.forward

        def plants(**inputs):
            out, boxes = forward(**inputs), "pred_boxes" if kind in DINOS else "decoder_coord_logits"
            setattr(out, boxes, planted.expand_as(getattr(out, boxes)))
            return out

        monkeypatch.setattr(model, "forward", plants)
        expected = [[15, 10, 45, 30], [7.5, 22.5, 22.5, 67.5]]
    for found, box in zip(localizer(pictures[:2]), expected):
        assert len(found) == 1  # they all are one box: non-maximum suppression
        torch.testing.assert_close(found.boxes, torch.tensor([box], dtype=torch.float32), atol=1e-4, rtol=0)


def test_threshold_overlap_and_number_of_boxes(tiny, pictures):
    def search(options):
        return create_localizer(spec(tiny, "owlv2", f"prompt=bird&{options}"), device="cpu")(pictures[:1])[0]

    everything = search(EVERYTHING)
    level = everything.scores[2].item() - 1e-5
    same(search(f"threshold={level:.6f}&nms=1"), everything.above(level))
    same(search("threshold=0&nms=1&max_boxes=2"), everything.select(torch.tensor([0, 1])))
    kept = search("threshold=0&nms=0.1&max_boxes=1000")
    overlap = box_iou(kept.boxes, kept.boxes) - torch.eye(len(kept))
    assert overlap.max() <= 0.1 and len(search("threshold=1")) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_never_a_box(tiny, pictures, kind):
    localizer = create_localizer(spec(tiny, kind, "prompt=bird&threshold=0"), device="cpu")
    with torch.no_grad():
        for parameter in localizer.network.model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(L2R2Error, match="all scores of the localizer are NaN"):
        localizer(pictures[:1])


def test_half_precision_and_the_class_free_score(tiny, pictures):
    exact = create_localizer(spec(tiny, "owlv2", f"score=objectness&{EVERYTHING}"), device="cpu")
    half = create_localizer(spec(tiny, "owlv2", f"score=objectness&dtype=bfloat16&{EVERYTHING}"), device="cpu")
    (a,), (b,) = exact(pictures[:1]), half(pictures[:1])
    assert half.network.model.dtype == torch.bfloat16 and b.boxes.dtype == torch.float32
    assert a.scores[0] == pytest.approx(b.scores[0].item(), abs=0.02) and not torch.equal(a.scores[:1], b.scores[:1])
    with torch.inference_mode():
        pixels = exact.network.processor(images=pictures[0], return_tensors="pt")["pixel_values"]
        features = exact.network.model.image_embedder(pixels)[0].flatten(1, 2)
        assert a.scores[0] <= exact.network.model.objectness_predictor(features).sigmoid().max() + 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("prompt=", "has an empty prompt"),
        ("prompt=bird&prompt=. .", "has an empty prompt"),
        ("prompt=bird&threshold=2", "threshold must be a number between 0 and 1"),
        ("prompt=bird&dtype=int8", "dtype must be one of float32, float16, bfloat16"),
        ("prompt=bird&score=objectness", "use one or the other"),
        ("prompt=bird&max_boxes=0", "max_boxes must be a whole number"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, options, message):
    with pytest.raises(L2R2Error, match=message):
        create_localizer(spec(tiny, "owlv2", options))


def test_prompts_that_the_network_cannot_read_are_refused(tiny, pictures):
    with pytest.raises(L2R2Error, match="tokens; OWLv2 takes at most 16"):
        create_localizer(spec(tiny, "owlv2", "prompt=abcdefghijklmnopqrstuvwxyz"))(pictures)
    with pytest.raises(L2R2Error, match="tokens; grounding-dino takes at most 32"):
        create_localizer(spec(tiny, "grounding-dino", f"prompt={' '.join(['bird'] * 40)}"))(pictures)


def test_networks_that_cannot_be_had_are_one_sentence(tiny, tmp_path):
    with pytest.raises(L2R2Error, match="run `hf download nobody/nothing`, then give the folder"):
        create_localizer("owlv2:nobody/nothing?prompt=a")
    with pytest.raises(L2R2Error, match="no such folder, and not a Hub id"):
        create_localizer("owlv2:./models/owl?prompt=a")
    with pytest.raises(L2R2Error, match="is a model of type owlv2; use one of type grounding-dino or mm-grounding-dino"):
        create_localizer(f"grounding-dino:{tiny('owlv2')}?prompt=a")
    with pytest.raises(L2R2Error, match="needs a Hub id or the folder of a model"):
        create_localizer("owlv2?prompt=a")
    model = create_localizer(spec(tiny, "owlv2", "prompt=a")).network.model
    model.config.save_pretrained(tmp_path)
    create_localizer(spec(tiny, "owlv2", "prompt=a")).network.processor.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # weights there are, but pickled
    with pytest.raises(L2R2Error, match="cannot be loaded as a transformers model with safetensors weights"):
        create_localizer(f"owlv2:{tmp_path}?prompt=a")

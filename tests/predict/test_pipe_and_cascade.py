"""Files through threads, batches filled across images and boxes, and a cascade: the same answers, by less work."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_run
from PIL import Image

from l2r2_models import Detections, L2R2Error, Predictor
from l2r2_models.boxes import BoxEntry
from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.hardware import has_bf16
from l2r2_models.images import LazyImage
from l2r2_models.predict import classify, items
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file


@pytest.fixture
def photos(tmp_path):
    """Twelve JPEGs with 0 to 3 boxes each, one of them damaged, another without an entry."""
    rng, paths, boxes = np.random.default_rng(0), [], {}
    (tmp_path / "photos").mkdir()
    for i in range(12):
        path = tmp_path / "photos" / f"{i:02}.jpg"
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((400, 300), Image.Resampling.BICUBIC).save(path, quality=90)
        corners = [[10.0 * k, 5.0, 10.0 * k + 90 + 40 * i % 200, 120.0 + 10 * k] for k in range(i % 4)]
        scores = [0.9 - 0.1 * k for k in range(i % 4)]
        boxes[str(path)] = BoxEntry.from_detections(Detections.from_lists(corners, (300, 400), scores))
        paths.append(path)
    paths[4].write_bytes(paths[4].read_bytes()[:200])
    del boxes[str(paths[7])]
    return paths, boxes


def rows_seen(predictor):
    """How many views the backbone sees, by pass."""
    seen = []
    predictor.model.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def same(a, b, tolerance=1e-4):
    assert [p.file for p in a] == [p.file for p in b] and [p.failure for p in a] == [p.failure for p in b]
    for one, other in zip(a, b):
        assert [(o.label, o.source, o.box, o.reason) for o in one.objects] == [
            (o.label, o.source, o.box, o.reason) for o in other.objects
        ]
        assert [o.score for o in one.objects] == pytest.approx([o.score for o in other.objects], abs=tolerance)


def test_answers_with_and_without_threads_are_the_same(run, photos):
    paths, boxes = photos
    plain = list(Predictor.from_pretrained(run, device="cpu", workers=0).predict_files(paths, boxes))
    assert sum(p.failure is not None for p in plain) == 1 and "damaged" in plain[4].failure
    for workers, batch_size in ((1, 32), (3, 2), (4, 5)):
        predictor = Predictor.from_pretrained(run, device="cpu", workers=workers, batch_size=batch_size)
        same(plain, list(predictor.predict_files(paths, boxes)))


def test_a_pass_on_a_cpu_has_few_views(run, photos, monkeypatch):
    """Activations of more views leave the caches, which takes up to twice the time."""
    paths, boxes = photos
    expected = list(Predictor.from_pretrained(run, device="cpu").predict_files(paths, boxes))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    predictor = Predictor.from_pretrained(run, device="cpu")
    seen = rows_seen(predictor)
    same(expected, list(predictor.predict_files(paths, boxes)))
    assert max(seen) == 4 and len(seen) > 1


def test_files_answer_as_the_decoded_images_do(run, photos):
    paths, boxes = photos
    predictor = Predictor.from_pretrained(run, device="cpu")
    assert predictor.model.view_spec.decode == "scaled"
    good = [p for p in paths if p not in (paths[4], paths[7])]
    given = predictor([Image.open(p) for p in good], [boxes[str(p)].detections((300, 400), "") for p in good])
    for file, image in zip(predictor.predict_files(good, boxes), given):  # a view of 32 pixels out of 400: at half the scale
        assert [o.score for o in file.objects] == pytest.approx([o.score for o in image.objects], abs=0.02)


@pytest.mark.parametrize("branches", [("full",), ("fg",), ("fg", "bg"), ("full", "fg", "bg")])
def test_files_are_predicted_whatever_the_branches(branches, photos, tmp_path):
    paths, boxes = photos
    predictor = Predictor.from_pretrained(write_run(tmp_path / "run", branches=branches), device="cpu")
    found = list(predictor.predict_files(paths[:4], boxes))
    given = predictor([Image.open(p) for p in paths[:4]], [boxes[str(p)].detections((300, 400), "") for p in paths[:4]])
    for file, image in zip(found, given):
        assert [(o.source, o.reason, o.box) for o in file.objects] == [(o.source, o.reason, o.box) for o in image.objects]
        assert [o.score for o in file.objects] == pytest.approx([o.score for o in image.objects], abs=0.02)


def test_batches_are_full_across_images_and_boxes_and_nothing_is_seen_twice(run, photos, monkeypatch):
    paths, boxes = photos
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # enough for whole batches
    predictor = Predictor.from_pretrained(run, device="cpu", batch_size=4)
    seen = rows_seen(predictor)
    answers = list(predictor.predict_files(paths, boxes))
    objects = [o for p in answers for o in p.objects]
    with_box = sum(o.source == "fused" for o in objects)
    assert sum(seen) == 11 + with_box  # each whole image once, each box once, and no fg without a box
    assert len(seen) == -(-len(objects) // 4)


def test_an_image_with_many_boxes_is_looked_at_once(run, photos):
    predictor = Predictor.from_pretrained(run, device="cpu", batch_size=4, max_objects=50)
    seen = rows_seen(predictor)
    boxes = [[i, i, 60 + i, 50 + i] for i in range(30)]
    assert len(predictor(photos[0][0], boxes).objects) == 30 and sum(seen) == 31


def test_large_images_are_not_all_held_at_once(run, dataset, monkeypatch):
    """Whole images that wait for a localizer, or to be cut on a GPU, are bounded by their pixels."""
    from l2r2_models.localize.controls import Center

    monkeypatch.setattr(items, "BATCH_PIXELS", 3 * 60 * 40)
    predictor = Predictor.from_pretrained(run, device="cpu", localizer="center")
    batches, original = [], Center.find
    monkeypatch.setattr(Center, "find", lambda self, images, *more: batches.append(len(images)) or original(self, images, *more))
    paths = gather([dataset], split="train").paths
    assert len(list(predictor.predict_files(paths))) == 12 and batches == [4, 4, 4]


def test_files_are_decoded_no_finer_than_needed(run, tmp_path, monkeypatch):
    Image.new("RGB", (800, 600), (90, 80, 200)).save(tmp_path / "a.jpg")
    decoded, original = [], LazyImage.load

    def load(self, scale=1):
        image = original(self, scale)
        decoded.append(image.width * image.height)
        return image

    monkeypatch.setattr(LazyImage, "load", load)
    predictor = Predictor.from_pretrained(run, device="cpu", workers=0)
    entry = BoxEntry(((0, 0, 400, 300),), (1.0,), ("",))
    list(predictor.predict_files([tmp_path / "a.jpg"], {str(tmp_path / "a.jpg"): entry}))
    assert decoded == [200 * 150]


# ---- cascade ----


def checkpoint_with(fusion, tmp_path, **options):
    """A run whose fg is sometimes sure."""
    checkpoint = load_checkpoint(write_run(tmp_path / "run", fusion=fusion, **options))
    for name, scale in (("fg", 6.0), ("full", 4.0)):
        head = checkpoint.model.heads[name]
        torch.nn.init.normal_(head.weight, std=scale * 0.3, generator=torch.Generator().manual_seed(len(name)))
    return checkpoint


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_cascade_of_robust_gives_the_same_labels_and_scores_by_fewer_looks(photos, tmp_path, batch_size, shared):
    paths, boxes = photos
    checkpoint = checkpoint_with("robust", tmp_path, shared=shared)
    scores = [o.fg.score for p in Predictor(checkpoint, device="cpu").predict_files(paths, boxes) for o in p.objects if o.fg]
    threshold = sorted(scores)[len(scores) // 3] - 1e-4  # two thirds of the boxes are sure
    checkpoint.model.fusion.threshold.fill_(threshold)
    plain = list(Predictor(checkpoint, device="cpu", batch_size=batch_size).predict_files(paths, boxes))
    cascade = Predictor(checkpoint, device="cpu", batch_size=batch_size, cascade=0)
    looked = []
    hook = cascade.model.heads["full"].register_forward_pre_hook(lambda _, args: looked.append(len(args[0])))
    answers = list(cascade.predict_files(paths, boxes))
    hook.remove()
    skipped = 0
    for one, other in zip(plain, answers):
        assert (one.file, one.failure) == (other.file, other.failure) and len(one.objects) == len(other.objects)
        for a, b in zip(one.objects, other.objects):
            assert (a.label, a.source, a.box) == (b.label, b.source, b.box) and a.score == pytest.approx(b.score, abs=1e-5)
            if b.source == "fused" and b.full is None:
                skipped += 1
                assert a.fg.score > threshold - 1e-5 and b.reason == "the object decides"
            else:
                assert b.full.label == a.full.label and a.reason == b.reason
    sure = [all(o.full is None for o in p.objects) for p in answers if p.failure is None]
    assert skipped > 0 and sum(looked) == 11 - sum(sure) and 0 < sum(sure) < 11


@pytest.mark.parametrize("fusion", ["average", "agreement", "objectness_max_confidence", "scaled_average"])
def test_a_fusion_that_always_needs_all_branches_says_so_and_stays_right(fusion, photos, tmp_path, caplog):
    paths, boxes = photos
    checkpoint = checkpoint_with(fusion, tmp_path)
    answers = list(Predictor(checkpoint, device="cpu", cascade=0).predict_files(paths, boxes))
    same(list(Predictor(checkpoint, device="cpu").predict_files(paths, boxes)), answers)
    assert "saves nothing" in caplog.text


@pytest.mark.parametrize(
    "fusion",
    [
        "max_confidence",
        "max_scaled_confidence",
        {"name": "robust", "threshold": 0.4},
        {"name": "agreement", "misled": 1.0},
        {"name": "two_worlds", "misled": 1.0},
        {"name": "agreement", "misled": 0.5},
        "scaled_weighted_average",
    ],
)
def test_no_context_changes_what_is_decided(fusion):
    """The bound, against contexts of every kind, certain ones too."""
    from l2r2_models import create_fusion

    torch.manual_seed(0)
    made = create_fusion(fusion, 3, 5)
    if made.name == "scaled_weighted_average":
        made.weight.fill_(1.0)
    fg = torch.randn(400, 5) * torch.logspace(-1, 2, 400)[:, None]
    decided = made.decided(fg, torch.ones(400))
    assert decided.shape == (400,) and (decided.any() or made.name == "agreement")
    answers = [made(fg, torch.randn(2, 400, 5) * scale, torch.ones(400)) for scale in (0.0, 1.0, 30.0, 1000.0)]
    for answer in answers[1:]:
        assert torch.equal(answer[decided].softmax(-1), answers[0][decided].softmax(-1))


def test_a_cascade_needs_its_branches_and_no_groups(run, tmp_path):
    with pytest.raises(L2R2Error, match="needs a full branch"):
        Predictor.from_pretrained(write_run(tmp_path / "plain", branches=("full",)), device="cpu", cascade=0)
    with pytest.raises(L2R2Error, match="predict without cascade"):
        Predictor.from_pretrained(run, device="cpu", cascade=0).keeping_logits()
    with pytest.raises(L2R2Error, match="use one or the other"):
        Predictor.from_pretrained(run, device="cpu", cascade=0, image_rule="full")


def test_a_file_made_by_a_cascade_is_not_continued_without(run, photos, tmp_path):
    inputs = gather([photos[0][0]])
    predict_to_file(Predictor.from_pretrained(run, device="cpu", cascade=0), inputs, tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text())["settings"]["cascade"] == {"loss": 0.0, "threshold": None}
    with pytest.raises(L2R2Error, match="made with"):
        predict_to_file(Predictor.from_pretrained(run, device="cpu"), inputs, tmp_path / "o.json")


# ---- precision ----


def test_bfloat16_is_asked_for_and_close(run, photos, monkeypatch):
    paths, boxes = photos
    if has_bf16(torch.device("cpu")):
        plain = list(Predictor.from_pretrained(run, device="cpu").predict_files(paths[:4], boxes))
        fast = list(Predictor.from_pretrained(run, device="cpu", precision="bf16").predict_files(paths[:4], boxes))
        for one, other in zip(plain, fast):
            assert [o.score for o in one.objects] == pytest.approx([o.score for o in other.objects], abs=0.05)
    monkeypatch.setattr(classify, "has_bf16", lambda device: False)
    with pytest.raises(L2R2Error, match="no bfloat16 instructions"):
        Predictor.from_pretrained(run, device="cpu", precision="bf16")
    with pytest.raises(L2R2Error, match="Unknown precision"):
        Predictor.from_pretrained(run, device="cpu", precision="half")


@pytest.mark.parametrize("fg_mode", ["crop", "late"])
def test_images_that_look_alike_are_not_taken_for_one(fg_mode, tmp_path):
    """Without names, nothing but their identity tells them apart."""
    checkpoint = load_checkpoint(write_run(tmp_path / "run"))
    checkpoint.model.view_spec = replace(checkpoint.model.view_spec, fg_mode=fg_mode)
    predictor = Predictor(checkpoint, device="cpu")
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    boxes = [[[1, 1, 20, 20]], [[5, 5, 30, 30]], None]
    found = predictor([image, image.copy(), image], boxes)
    for one, given in zip(found, boxes):
        alone = predictor(image, given).objects[0]
        assert one.objects[0].box == alone.box and one.objects[0].score == pytest.approx(alone.score, abs=1e-5)

"""From files to predictions: several objects, no object, bad files, and a prediction file that can be continued."""

import json

import pytest
import torch
from conftest import write_run
from PIL import Image

from l2r2_models import Detections, ImageError, L2R2Error, Predictor
from l2r2_models.boxes import BoxEntry
from l2r2_models.checkpoints.checkpoint import save_checkpoint
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.table import read_table
from l2r2_models.images import load_image
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.views import ViewSpec, make_views


@pytest.fixture
def predictor(run):
    return Predictor.from_pretrained(run, device="cpu")


def test_a_prediction_is_the_models_output_for_the_views(predictor, dataset):
    path, box = dataset / "images" / "train_000.png", [5.0, 4, 40, 30]
    prediction = predictor(path, [box])
    views = make_views([load_image(path)], torch.tensor([box]), predictor.model.view_spec)
    out = predictor.model.forward_views(views.full, views.fg, views.has_fg)
    (answer,) = prediction.objects
    for said, logits in ((answer, out.fused), (answer.full, out.full), (answer.fg, out.fg)):
        probability, index = logits.softmax(-1)[0].max(0)
        assert said.label == predictor.labels[index] and said.score == pytest.approx(probability.item(), abs=1e-5)
    assert answer.box == tuple(box) and answer.source == "fused" and prediction.label == answer.label
    assert answer.top[0].label == answer.label and len(answer.top) == 3


def test_every_object_of_an_image_gets_its_own_prediction(predictor, dataset):
    path = dataset / "images" / "train_000.png"
    boxes = Detections.from_lists([[0, 0, 20, 20], [20, 10, 60, 40], [3, 3, 9, 9]], (40, 60), [0.5, 0.9, 0.7])
    together = predictor(path, boxes).objects
    assert [o.box_score for o in together] == [0.9, 0.7, 0.5]
    for answer in together:
        (alone,) = predictor(path, [answer.box]).objects
        assert alone.fg.label == answer.fg.label and alone.fg.score == pytest.approx(answer.fg.score, abs=1e-4)
    few = Predictor(predictor.checkpoint, max_objects=2, device="cpu")
    assert [o.box_score for o in few(path, boxes).objects] == [0.9, 0.7]


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        (None, "no box was given"),
        ([], "no object was found"),
        (Detections.from_lists([[1, 1, 30, 30]], (40, 60), [0.01]), "no box reaches the score 0.2"),
        ([[100, 100, 200, 200]], "every box is empty or outside"),
        ([[10, 10, 10, 30]], "every box is empty or outside of the image"),
        ([[float("nan")] * 4], "every box is empty or outside of the image"),
    ],
)
def test_without_a_usable_box_the_full_branch_is_used_with_the_reason(predictor, dataset, boxes, reason):
    path = dataset / "images" / "train_000.png"
    (answer,) = predictor(path, boxes).objects
    assert answer.source == "full" and reason in answer.reason and answer.box is None and answer.fg is None
    assert (answer.label, answer.score) == (answer.full.label, answer.full.score)


def test_boxes_of_another_image_size_are_refused_and_a_failed_localizer_is_named(predictor, dataset):
    path = dataset / "images" / "train_000.png"
    with pytest.raises(L2R2Error, match="but it is"):
        predictor(path, Detections.from_lists([[1, 1, 30, 30]], (400, 600)))
    (prediction,) = predictor.predict_files([path], {str(path): BoxEntry(failure="out of memory")})
    assert "the localizer failed (out of memory)" in prediction.objects[0].reason


def test_a_box_over_the_border_is_used_where_it_lies_inside(predictor, dataset):
    (answer,) = predictor(dataset / "images" / "train_000.png", [[-10, -10, 20, 20]]).objects
    assert answer.source == "fused"


def test_batches_give_the_predictions_of_single_images(run, dataset):
    inputs = gather([dataset], split="train")
    one_by_one = list(Predictor.from_pretrained(run, batch_size=1, device="cpu").predict_files(inputs.paths, inputs.entries))
    batched = list(Predictor.from_pretrained(run, batch_size=5, device="cpu").predict_files(inputs.paths, inputs.entries))
    assert [p.file for p in batched] == [str(p) for p in inputs.paths]
    for a, b in zip(one_by_one, batched):
        assert a.label == b.label and a.objects[0].score == pytest.approx(b.objects[0].score, abs=1e-4)


def test_the_file_upside_down_by_exif_is_classified_upright(predictor, tmp_path, dataset):
    upright = Image.open(dataset / "images" / "train_000.png")
    turned = upright.transpose(Image.Transpose.ROTATE_180)
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=exif)
    box = [[5, 4, 40, 30]]
    assert predictor(tmp_path / "turned.png", box).objects == predictor(upright, box).objects


def test_masks_of_a_data_set_are_used_in_prediction_as_in_training(tmp_path, dataset):
    """The views that predict gives the model are those that training gave it."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3)
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32, fg_mode="masked_crop")
    save_checkpoint(model, tmp_path / "run", ["blue", "green", "red"])
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 40, 30))
    mask.paste(0, (10, 5, 20, 15))
    mask.save(dataset / "mask.png")
    (dataset / "metadata.csv").write_text("file_name,label,mask_file\nimages/train_000.png,red,mask.png\n")
    inputs = gather([dataset])
    predictor = Predictor.from_pretrained(tmp_path / "run", device="cpu")
    (prediction,) = predictor.predict_files(inputs.paths, inputs.entries, inputs.masks)
    item = ViewDataset(read_table(dataset), ("blue", "green", "red"), model.view_spec, ("full", "fg"))[0]
    out = predictor.model.forward_views(item["full"][None], item["fg"][None], item["has_fg"][None])
    assert prediction.objects[0].box == (10, 5, 40, 30)
    assert prediction.objects[0].fg.score == pytest.approx(out.fg.softmax(-1).max().item(), abs=1e-5)


def test_one_bad_file_is_a_failure_and_the_others_go_on(predictor, dataset, tmp_path):
    bad = dataset / "images" / "train_001.png"
    bad.write_text("not an image")
    inputs = gather([dataset], split="train")
    report = predict_to_file(predictor, inputs, tmp_path / "out.json")
    assert len(report.images) == 12 and [f["file"] for f in report.failures] == [str(bad)]
    with pytest.raises(ImageError, match="train_001"):
        predictor(bad)


def test_an_image_that_is_gone_is_one_failure(predictor, dataset, tmp_path):
    (dataset / "images" / "train_001.png").unlink()
    report = predict_to_file(predictor, gather([dataset], split="train"), tmp_path / "out.json")
    assert len(report.images) == 12 and "no such file" in report.failures[0]["failure"]


def test_a_file_of_predictions_continues_and_repeats_only_failures(predictor, dataset, tmp_path, monkeypatch):
    out, bad = tmp_path / "out.json", dataset / "images" / "train_001.png"
    good = bad.read_bytes()
    bad.write_text("not an image")
    inputs = gather([dataset], split="train")
    predict_to_file(predictor, inputs, out)
    bad.write_bytes(good)
    seen = []
    original = predictor.predict_files
    monkeypatch.setattr(predictor, "predict_files", lambda paths, *rest: original(seen.extend(paths) or seen, *rest))
    report = predict_to_file(predictor, inputs, out)
    assert seen == [bad] and report.kept == 11 and not report.failures
    fresh = predict_to_file(predictor, inputs, tmp_path / "fresh.json")
    assert [i["file"] for i in fresh.images] == [i["file"] for i in report.images]
    assert json.loads(out.read_text())["images"] == json.loads((tmp_path / "fresh.json").read_text())["images"]


def test_an_interrupted_file_of_predictions_loses_nothing(predictor, dataset, tmp_path):
    inputs, out = gather([dataset]), tmp_path / "out.json"

    def dies(items, total):
        for i, item in enumerate(items):
            if i == 17:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        predict_to_file(predictor, inputs, out, dies)
    report = predict_to_file(predictor, inputs, out)
    assert report.kept == 17 and len(report.images) == 36 and len(json.loads(out.read_text())["images"]) == 36


def test_predictions_of_another_model_or_other_settings_are_not_mixed(run, dataset, tmp_path):
    inputs, out = gather([dataset], split="train"), tmp_path / "out.json"
    predict_to_file(Predictor.from_pretrained(run, device="cpu"), inputs, out)
    other = write_run(tmp_path / "other", seed=1)
    with pytest.raises(L2R2Error, match="made with a different model_sha256"):
        predict_to_file(Predictor.from_pretrained(other, device="cpu"), inputs, out)
    with pytest.raises(L2R2Error, match="made with a different settings"):
        predict_to_file(Predictor.from_pretrained(run, box_threshold=0.9, device="cpu"), inputs, out)
    (tmp_path / "notes.json").write_text("[1, 2]")
    with pytest.raises(L2R2Error, match="was not written by"):
        predict_to_file(Predictor.from_pretrained(run, device="cpu"), inputs, tmp_path / "notes.json")


def test_a_plain_classifier_predicts_too(tmp_path, dataset):
    plain = Predictor.from_pretrained(write_run(tmp_path / "plain", branches=("full",)), device="cpu")
    (answer,) = plain(dataset / "images" / "train_000.png", [[1, 1, 20, 20]]).objects
    assert answer.source == "full" and answer.reason == "the model has no fg branch"

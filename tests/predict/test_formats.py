"""Predictions in the formats of other tools: the rules of MegaDetector's validator, COCO, and interruptions."""

import json
import math
import re

import pytest
from conftest import sentence

from l2r2_models import L2R2Error, Predictor
from l2r2_models.boxes import read_boxes
from l2r2_models.predict.foreign import write_coco, write_megadetector
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.predict.rendering import About


@pytest.fixture
def predictor(run):
    return Predictor.from_pretrained(run, device="cpu")


@pytest.fixture
def photos(dataset):
    """Six photos of two cameras: a person and an animal, a drone, nothing, a failed detector, not in the box file, damaged."""
    folder = dataset.parent / "photos"
    for camera, names in (("a", "123"), ("b", "123")):
        (folder / camera).mkdir(parents=True)
        for name in names:
            (folder / camera / f"{name}.png").write_bytes((dataset / "images" / f"test_00{name}.png").read_bytes())
    (folder / "b" / "3.png").write_text("not an image")
    found = [
        {"category": "2", "conf": 0.5, "bbox": [0, 0, 0.5, 0.5]},
        {"category": "1", "conf": 0.9, "bbox": [0.25, 0.5, 0.9, 0.5]},
    ]
    boxes = {
        "info": {"format_version": "1.6", "detector": "md_v5a.0.0.pt"},
        "detection_categories": {"1": "animal", "2": "person", "7": "drone"},
        "images": [
            {"file": "a/1.png", "detections": found},
            {"file": "a/2.png", "detections": [{"category": "7", "conf": 0.4, "bbox": [0.1, 0.1, 0.2, 0.2]}]},
            {"file": "a/3.png", "detections": []},
            {"file": "b/1.png", "failure": "Failure inference", "detections": None},
            {"file": "b/3.png", "detections": found},
        ],
    }
    (dataset.parent / "md.json").write_text(json.dumps(boxes))
    return folder


def check_megadetector(data):
    """The rules of the format's description and of its validator, written anew."""
    assert isinstance(data["info"]["format_version"], str) and float(data["info"]["format_version"]) == 1.6
    for section in ("detection_categories", "classification_categories"):
        assert data[section] and all(re.fullmatch(r"\d+", key) and name for key, name in data[section].items())
    assert set(data) == {"info", "images", "detection_categories", "classification_categories"}
    assert len({image["file"] for image in data["images"]}) == len(data["images"])
    for image in data["images"]:
        assert "\\" not in image["file"] and not image["file"].startswith("/")
        if image.get("failure") is not None:
            assert isinstance(image["failure"], str) and image["detections"] is None
            continue
        for found in image["detections"]:
            x, y, width, height = found["bbox"]
            assert found["category"] in data["detection_categories"]
            assert isinstance(found["conf"], float) and 0 <= found["conf"] <= 1
            assert min(x, y, width, height) >= 0 and max(x + width, y + height) <= 1 + 1e-5
            scores = [score for _, score in found["classifications"]]
            assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 and math.isfinite(score) for score in scores)
            assert all(key in data["classification_categories"] for key, _ in found["classifications"])


def test_megadetector_files_follow_the_rules_and_keep_the_detectors_names(predictor, photos, tmp_path):
    inputs, out = gather([photos], tmp_path / "md.json"), tmp_path / "out.json"
    images = predict_to_file(predictor, inputs, out, format="megadetector").images
    data = json.loads(out.read_text())
    check_megadetector(data)
    assert data["info"]["detector"] == "md_v5a.0.0.pt" and data["info"]["classifier"] == "run"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", data["info"]["classification_completion_time"])
    assert data["detection_categories"] == {"1": "animal", "2": "person", "7": "drone", "8": "object"}
    assert list(data["classification_categories"].values()) == ["blue", "green", "red"]
    by_name = {image["file"]: image for image in data["images"]}
    assert list(by_name) == ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"]
    animal, person = by_name["a/1.png"]["detections"]
    assert (animal["category"], animal["conf"], person["category"], person["conf"]) == ("1", 0.9, "2", 0.5)
    assert animal["bbox"] == [0.25, 0.5, 0.75, 0.5] and person["bbox"] == [0, 0, 0.5, 0.5]  # clipped to the image
    top = images[0]["objects"][0]["top"]
    assert [[data["classification_categories"][key], score] for key, score in animal["classifications"]] == [
        [one["label"], one["score"]] for one in top
    ]
    assert by_name["a/3.png"]["detections"] == [] and "Failure inference" in by_name["b/1.png"]["failure"]
    (whole,) = by_name["b/2.png"]["detections"]  # not in the box file: classified as a whole
    assert whole["bbox"] == [0, 0, 1, 1] and whole["conf"] == 1
    assert "b/3.png" in by_name["b/3.png"]["failure"]


def test_a_megadetector_file_is_read_back_as_boxes(predictor, photos, tmp_path):
    given = read_boxes(tmp_path / "md.json")
    predict_to_file(predictor, gather([photos], tmp_path / "md.json"), tmp_path / "out.json", format="megadetector")
    found = read_boxes(tmp_path / "out.json")
    assert found.format == "MegaDetector" and found.detector == "md_v5a.0.0.pt"
    assert found.entries["a/1.png"].labels == ("animal", "person") and found.entries["a/2.png"] == given.entries["a/2.png"]


def test_coco_annotations_are_the_boxes_and_classes_in_pixels(predictor, photos, tmp_path):
    out = tmp_path / "out.json"
    images = predict_to_file(predictor, gather([photos], tmp_path / "md.json"), out, format="coco").images
    data = json.loads(out.read_text())
    names = {c["id"]: c["name"] for c in data["categories"]}
    assert names == {1: "blue", 2: "green", 3: "red"}
    first, second = data["images"][:2]
    assert (first["file_name"], first["width"], first["height"]) == ("a/1.png", 60, 40)
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    of_first = [a for a in data["annotations"] if a["image_id"] == first["id"]]
    assert [a["bbox"] for a in of_first] == [[15, 20, 45, 20], [0, 0, 30, 20]]
    assert [(names[a["category_id"]], a["score"]) for a in of_first] == [(o["label"], o["score"]) for o in images[0]["objects"]]
    assert "failure" in data["images"][5] and not any(a["image_id"] == 6 for a in data["annotations"])
    entry = read_boxes(out).entries["a/2.png"]
    assert entry.boxes == ((6, 4, 18, 12),) and second["file_name"] == "a/2.png"


@pytest.mark.parametrize("name", ["megadetector", "coco"])
def test_an_interrupted_file_is_the_same_once_continued(predictor, photos, tmp_path, name):
    inputs, out = gather([photos], tmp_path / "md.json"), tmp_path / "out.json"

    def dies(items, total):
        for i, item in enumerate(items):
            if i == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        predict_to_file(predictor, inputs, out, dies, format=name)
    assert not out.exists() and predict_to_file(predictor, inputs, out, format=name).kept == 3
    predict_to_file(predictor, inputs, tmp_path / "once.json", format=name)

    def contents(path):
        data = json.loads(path.read_text())
        data["info"].pop("classification_completion_time", None)
        return data

    assert contents(out) == contents(tmp_path / "once.json")
    (photos / "b" / "3.png").write_bytes((photos / "b" / "2.png").read_bytes())  # the damaged photo is repaired
    assert predict_to_file(predictor, inputs, out, format=name).kept == 5
    before = out.read_bytes()
    assert predict_to_file(predictor, inputs, out, format=name).kept == 6 and out.read_bytes() == before


def test_formats_are_renderings_of_the_same_predictions(predictor, photos, tmp_path, monkeypatch):
    inputs, out = gather([photos / "a"], tmp_path / "md.json"), tmp_path / "out.json"
    predict_to_file(predictor, inputs, out, format="megadetector")
    monkeypatch.setattr(predictor, "predict_files", lambda paths, *rest: iter(() if not paths else 1 / 0))
    assert predict_to_file(predictor, inputs, out, format="coco").kept == 3  # another format without another run
    assert "annotations" in json.loads(out.read_text())


def test_an_unknown_format_is_a_sentence(l2r2, run, photos, tmp_path):
    said = sentence(l2r2("predict", run, photos, "-o", tmp_path / "out.json", "--format", "timelapse"))
    assert 'Unknown format "timelapse"' in said and "choose from json, jsonl, csv, parquet, megadetector, coco" in said
    (tmp_path / "out.json").write_text('{"images": []}')
    with pytest.raises(L2R2Error, match="cannot be continued without"):
        predict_to_file(Predictor.from_pretrained(run, device="cpu"), gather([photos]), tmp_path / "out.json", format="coco")


@pytest.mark.parametrize("labels, name", [(["fox", "unknown"], "unknown (abstained)"), (["fox", "owl"], "unknown")])
def test_an_abstained_prediction_is_told_from_a_class_called_unknown(tmp_path, labels, name):
    def record(file, label, source):
        top = [{"label": label if source == "fused" else labels[1], "score": 0.5}]
        made = {"label": label, "score": 0.5, "source": source, "reason": "", "box": [1, 1, 5, 5], "fg": {}, "top": top}
        return {"file": file, "width": 10, "height": 10, "objects": [made]}

    records = [record("a.jpg", labels[1], "fused"), record("b.jpg", "unknown", "abstained")]
    header = {"labels": labels, "localizer": None, "model": "run", "settings": {}}
    write_megadetector(tmp_path / "md.json", records, About("megadetector", header))
    data = json.loads((tmp_path / "md.json").read_text())
    check_megadetector(data)
    names = [data["classification_categories"][image["detections"][0]["classifications"][0][0]] for image in data["images"]]
    assert names == [labels[1], name]
    write_coco(tmp_path / "coco.json", records, About("coco", header))
    data = json.loads((tmp_path / "coco.json").read_text())
    by_id = {category["id"]: category["name"] for category in data["categories"]}
    assert [by_id[annotation["category_id"]] for annotation in data["annotations"]] == [labels[1], name]

"""Stored branch logits fused again are the predictions of a model with that fusion; the prediction for an image by each rule."""

import csv
import json
import shutil

import pytest
from conftest import sentence, write_dataset, write_run

from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.fusion import create_fusion
from l2r2_models.predict.fuse_again import fuse_again
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.predict.prediction import Answer, ObjectPrediction, image_answer


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run, its data (images with two, one and no boxes), and its predictions with logits."""
    folder = tmp_path_factory.mktemp("again")
    data = write_dataset(folder / "data", splits=("train", "val", "test"))
    rows = (data / "metadata.csv").read_text().splitlines()
    rows = [row for row in rows if "test_003" not in row] + [
        "images/test_003.png,red,test,,,,",
        "images/test_004.png,green,test,0,0,9,9",
    ]
    (data / "metadata.csv").write_text("\n".join(rows))
    run = write_run(folder / "run")
    inputs = gather([data], split="test")
    predict_to_file(Predictor.from_pretrained(run, device="cpu"), inputs, folder / "logits.json", store_logits=True)
    return run, data, folder / "logits.json"


def contents(path):
    data = json.loads(path.read_text())
    images = [{key: value for key, value in image.items() if key != "digest"} for image in data["images"]]
    return data["fusion"], data["settings"], images


def predicted(run, data, out, fusion=None, store=False):
    """The predictions of the run, with another fusion if given."""
    if fusion is not None:
        checkpoint = hub.load_checkpoint(run)
        checkpoint.model.fusion = create_fusion(fusion, checkpoint.model.branches, 3)
        run = out.parent / "changed"
        hub.save_checkpoint(checkpoint.model, run, checkpoint.labels)
    predict_to_file(Predictor.from_pretrained(run, device="cpu"), gather([data], split="test"), out, store_logits=store)
    fusion, settings, images = contents(out)
    for o in (o for image in images for o in image["objects"]):
        o.pop("logits", None)
    return fusion, {key: value for key, value in settings.items() if key != "store_logits"}, images


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("settings"),
        lambda data: data["settings"].pop("top"),
        lambda data: data.update(inputs=[1]),
        lambda data: data.update(labels=["a"]),
        lambda data: data["images"][0]["objects"][0]["logits"].update(fg=[1, 2]),
        lambda data: data["images"][0]["objects"][0].update(top="x"),
        lambda data: data["images"][0]["objects"][0]["logits"].update(fg=["x", 2, 3]),
    ],
)
def test_a_file_that_was_edited_is_one_sentence(stored, tmp_path, change):
    data = json.loads(stored[2].read_text())
    change(data)
    head, rows = {**data, "images": []}, ",\n".join(json.dumps(image) for image in data["images"])
    (tmp_path / "edited.json").write_text(json.dumps(head)[:-2] + "\n" + rows + "\n]}\n")
    with pytest.raises(L2R2Error, match=r"edited\.json: is not as `l2r2 predict` writes it"):
        fuse_again(tmp_path / "edited.json", tmp_path / "out.json", method="average")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("method", ["average", "max_confidence", "objectness_max_confidence"])
def test_another_fusion_gives_what_a_model_with_it_predicts(stored, tmp_path, method):
    run, data, logits = stored
    fuse_again(logits, tmp_path / "again.json", method=method)
    assert contents(tmp_path / "again.json") == predicted(run, data, tmp_path / "out.json", method, store=True)


def test_the_fitted_fusion_of_a_run_is_used(stored, tmp_path, l2r2):
    run, data, logits = stored
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    fit_run(copy, data, "val", method="scaled_average")
    assert l2r2("fuse", copy, "--predictions", logits, "-o", tmp_path / "again.json").returncode == 0
    fusion, settings, images = contents(tmp_path / "again.json")
    assert fusion["name"] == "scaled_average" and (fusion, settings, images) == predicted(
        copy, data, tmp_path / "out.json", store=True
    )
    assert "logits" not in images[0]["objects"][0] and "logits" in contents(logits)[2][0]["objects"][0]
    both = l2r2("fuse", copy, "--predictions", logits, "--method", "average", "-o", tmp_path / "x.json")
    assert both.returncode == 2 and "--predictions needs a fusion" in both.stderr
    with pytest.raises(L2R2Error, match='its fusion is "scaled_average"'):
        fuse_again(logits, tmp_path / "x.json", method="average", run=str(copy))


def test_a_csv_is_written_without_a_network(stored, tmp_path, l2r2):
    result = l2r2("fuse", "--predictions", stored[2], "--method", "average", "-o", tmp_path / "again.csv")
    assert result.returncode == 0 and '"name": "average"' in result.stdout
    rows = list(csv.DictReader((tmp_path / "again.csv").read_text().splitlines()))
    assert len(rows) == 13 and {row["source"] for row in rows} == {"fused", "full"}


def test_what_cannot_be_fused_again_is_a_sentence(stored, tmp_path, l2r2):
    run, data, logits = stored
    predict_to_file(Predictor.from_pretrained(run, device="cpu"), gather([data], split="val"), tmp_path / "plain.json")
    again = ("--method", "average", "-o", tmp_path / "x.json")
    assert "predict with --store-logits first" in sentence(l2r2("fuse", "--predictions", tmp_path / "plain.json", *again))
    (tmp_path / "other.json").write_text("{}")
    assert "is not a JSON file of `l2r2 predict`" in sentence(l2r2("fuse", "--predictions", tmp_path / "other.json", *again))
    assert "choose another -o" in sentence(l2r2("fuse", "--predictions", logits, "--method", "average", "-o", logits))
    assert "must be fitted" in sentence(
        l2r2("fuse", "--predictions", logits, "--method", "concat_mlp", "-o", tmp_path / "x.json")
    )
    assert "Unknown fusion" in sentence(l2r2("fuse", "--predictions", logits, "--method", "averige", "-o", tmp_path / "x.json"))
    assert "needs the format json" in sentence(l2r2("predict", run, data, "--store-logits", "-o", tmp_path / "x.csv"))
    with pytest.raises(L2R2Error, match="without cascade"):
        cascade = Predictor.from_pretrained(run, device="cpu", cascade=0)
        predict_to_file(cascade, gather([data], split="test"), tmp_path / "x.json", store_logits=True)
    other = write_run(tmp_path / "other_run")
    checkpoint = hub.load_checkpoint(other)
    hub.save_checkpoint(checkpoint.model, other, ["ant", "bee", "cat"])
    with pytest.raises(L2R2Error, match="has other classes"):
        fuse_again(logits, tmp_path / "x.json", run=str(other))


def answer(label, score, box_score, full=("cow", 0.6)):
    """An object whose fg says `label`; without a box score, one without a box."""
    fg = None if box_score is None else Answer(label, score)
    first = fg or Answer(*full)
    return ObjectPrediction(first.label, first.score, "fused", "because", Answer(*full), fg, None, None, box_score, (first,))


def test_image_rules():
    objects = (answer("ant", 0.7, 0.9), answer("bee", 0.99, 0.8), answer("cat", 1.0, 0.3))
    best, weighted, full = (image_answer(objects, rule) for rule in ("best", "weighted", "full"))
    assert (best.label, best.score, best.reason) == ("ant", 0.7, "because")
    assert (weighted.label, weighted.score) == ("bee", 0.99) and "0.99" in weighted.reason  # 0.79 against 0.63, 0.3 and 0.6
    assert (full.label, full.score) == ("cow", 0.6)
    sure = (answer("ant", 0.7, 0.9, ("cow", 0.8)),)
    assert image_answer(sure, "weighted").label == "cow" and image_answer((answer("", 0, None),), "weighted").label == "cow"


def test_the_image_rule_reaches_the_file(stored, tmp_path, l2r2):
    run, data, _ = stored
    out = tmp_path / "out.json"
    assert l2r2("predict", run, data, "--split", "test", "--image-rule", "full", "-o", out).returncode == 0
    for image in contents(out)[2]:
        assert image["image"]["label"] == image["objects"][0]["full"]["label"]
    said = sentence(l2r2("predict", run, data, "--split", "test", "-o", out))
    assert "made with a different settings" in said
    assert 'Unknown image rule "first"' in sentence(l2r2("predict", run, data, "--image-rule", "first", "-o", out))
    no_full = write_run(tmp_path / "no_full", branches=("fg", "bg"))
    assert "needs a model with a full branch" in sentence(l2r2("predict", no_full, data, "--image-rule", "full", "-o", out))


def test_storing_logits_hardly_changes_the_predictions(stored, tmp_path):
    run, data, logits = stored
    for image, plain in zip(contents(logits)[2], predicted(run, data, tmp_path / "out.json")[2]):
        for o, other in zip(image["objects"], plain["objects"]):
            assert o["label"] == other["label"] and o["score"] == pytest.approx(other["score"], abs=2e-5)


def test_an_image_that_was_stored_before_it_was_grouped_is_alone(stored, tmp_path):
    run, data, _ = stored
    file, again = tmp_path / "p.json", tmp_path / "again.json"
    predict_to_file(
        Predictor.from_pretrained(run, device="cpu"), gather([data], split="test"), file, store_logits=True, group="folder"
    )
    lines = file.read_text().splitlines()
    record = json.loads(lines[2].rstrip(","))
    del record["group"]
    lines[2] = json.dumps(record) + ","
    file.write_text("\n".join(lines) + "\n")
    fuse_again(file, again, method="average")
    groups = [image["group"]["name"] for image in json.loads(again.read_text())["images"]]
    assert len(set(groups)) == 2 and groups[1] == record["file"]

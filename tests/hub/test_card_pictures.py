"""The pictures of a model card, and its section on the audit."""

import json

import pytest
from conftest import write_run
from PIL import Image
from test_publish import EVALUATION, ROW, made

from l2r2_models import L2R2Error
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.hub.card_usage import localizer_metadata
from l2r2_models.hub.metadata import CardMetadata
from l2r2_models.runs import store_audit, store_evaluation


@pytest.fixture
def finished(tmp_path):
    return write_run(tmp_path / "runs" / "squares")


def evaluate_twice(finished):
    digest = hub.load_checkpoint(finished).digest
    rows = {name: {**ROW, "intervals": {"accuracy": [0.9, 0.95]}} for name in ("full", "fg", "fused: robust")}
    curves = {name: [i / 100 for i in range(20)] for name in rows}
    for split, accuracy in (("test_id", 0.93), ("test_ood", 0.5)):
        changed = {name: {**row, "accuracy": accuracy} for name, row in rows.items()}
        store_evaluation(finished, "squares", digest, {**EVALUATION, "split": split, "rows": changed, "risk": curves})


def test_the_card_has_the_pictures_of_home_and_away_and_of_risk_and_the_audit(finished, tmp_path):
    evaluate_twice(finished)
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    of_outputs = {name: {"accuracy": estimate, "mixed_rand": estimate} for name in ("full", "fg", "fused")}
    audit = {"split": "test_ood", "images": 40, "answers": of_outputs, "verdict": "The <b> decides."}
    store_audit(finished, "/home/someone/squares", audit)
    package = made(finished, tmp_path)
    assert package.problems == () and {"home_and_away.png", "risk_coverage.png"} <= set(package.files)
    text = (package.folder / "README.md").read_text()
    assert "![Accuracy on test\\_id against test\\_ood](home_and_away.png)" in text
    assert "Error rate on test\\_ood if only the most confident" in text
    assert "squares, split test\\_ood: 40 images" in text and "| fg | 50.0 (25.0 to 75.0) | 50.0 (25.0 to 75.0) |" in text
    assert "The &lt;b&gt; decides." in text and "someone" not in text
    for name in ("home_and_away.png", "risk_coverage.png"):
        with Image.open(package.folder / name) as image:
            assert image.width > 300 and len(set(image.convert("RGB").getdata())) > 50
    (finished / "audit" / "squares.test_ood.json").write_text("{}")
    with pytest.raises(L2R2Error, match="is not an audit"):
        made(finished, tmp_path / "again")


def test_an_audit_of_fewer_images_does_not_replace_a_larger_one(finished):
    answers = {"fused": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    for images in (40, 10, 60):
        file = store_audit(finished, "squares", {"split": "test", "images": images, "answers": answers, "verdict": ""})
        assert json.loads(file.read_text())["images"] == max(40, images)
    file.write_text("{")
    assert store_audit(finished, "squares", {"split": "test", "images": 5, "answers": answers, "verdict": ""}) == file
    assert json.loads(file.read_text())["images"] == 5


def test_without_matplotlib_the_card_has_no_pictures(finished, tmp_path, monkeypatch):
    evaluate_twice(finished)
    monkeypatch.setattr("l2r2_models.hub.card_pictures.find_spec", lambda name: None)
    package = made(finished, tmp_path)
    assert package.problems == () and not [name for name in package.files if name.endswith(".png")]
    assert ".png" not in (package.folder / "README.md").read_text()


def test_a_preset_on_the_card_is_the_localizer_that_it_stands_for(finished):
    known = localizer_metadata(hub.load_checkpoint(finished), CardMetadata(localizer="camera-trap"))
    assert known["spec"].startswith("owlv2:google/owlv2-base-patch16-ensemble?") and known["license"] == "apache-2.0"
    words = localizer_metadata(hub.load_checkpoint(finished), CardMetadata(localizer="boxes by hand", localizer_license="mit"))
    assert words["spec"] == "boxes by hand" and words["license"] == "mit"


def test_an_audit_of_other_weights_is_not_on_the_card(finished, tmp_path):
    store_audit(finished, "squares", {"split": "test", "images": 40, "answers": {}, "verdict": "Old."})
    file = finished / "audit" / "squares.test.json"
    file.write_text(file.read_text().replace(hub.load_checkpoint(finished).digest, "0" * 64))
    assert "Old." not in (made(finished, tmp_path).folder / "README.md").read_text()

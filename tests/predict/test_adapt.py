"""`--adapt`: images taken at the same place are fused jointly, independent of order and interruptions."""

import json
import os

import pytest
import torch
from conftest import write_dataset, write_run
from PIL import Image
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import L2R2Error, Predictor
from l2r2_models.evaluate.evaluator import evaluate_run, judge_run
from l2r2_models.evaluate.fit_run import fit_run
from l2r2_models.fusion import Grouping, fuse_groups
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run whose fusion knows its batch, and a data set with a site for each image of `test`."""
    folder = tmp_path_factory.mktemp("adapt")
    data = write_dataset(folder / "data", splits=("train", "val", "test"))
    lines = (data / "metadata.csv").read_text().splitlines()
    sites = [lines[0] + ",site", *(f"{line},{'AB'[i % 2] if 'test_000' not in line else ''}" for i, line in enumerate(lines[1:]))]
    (data / "metadata.csv").write_text("\n".join(sites))
    run = write_run(folder / "run")
    fit_run(run, data, "val")
    return run, data


@pytest.fixture
def predictor(fitted):
    return Predictor.from_pretrained(fitted[0], device="cpu")


@pytest.mark.parametrize("name", ["json", "jsonl", "csv"])
def test_predictions_are_those_of_the_fusion_that_knows_its_group(fitted, predictor, tmp_path, name):
    run, data = fitted
    inputs = gather([data], split="test")
    report = predict_to_file(predictor, inputs, tmp_path / f"out.{name}", adapt="group:site")
    judged = judge_run(run, data, "test", adapt="group:site")
    expected = judged.outputs[judged.answer].softmax(-1)
    assert judged.answer.endswith("by group:site")
    for image, path, p in zip(report.images, judged.data.table.rows, expected):
        answer = image["objects"][0]
        assert image["file"] == str(path.path) and answer["label"] == predictor.labels[int(p.argmax())]
        assert answer["score"] == pytest.approx(float(p.max()), abs=2e-4)
    assert {g: s.objects for g, s in report.shares.items()} == {"A": 5, "B": 6, str(inputs.paths[0]): 1}
    for group, share in report.shares.items():
        assert share.misled == pytest.approx(judged.shares[group].misled, abs=1e-3)


def test_the_reason_names_the_share_and_the_place(fitted, predictor, tmp_path):
    report = predict_to_file(predictor, gather([fitted[1]], split="test"), tmp_path / "out.json", adapt="folder")
    (share,) = report.shares.values()
    assert all(
        f"{100 * share.misled:.0f} % of this folder's backgrounds are misleading; " in i["objects"][0]["reason"]
        for i in report.images
    )


def test_an_image_alone_in_its_group_is_predicted_as_without_groups(fitted, predictor, tmp_path):
    inputs = gather([fitted[1]], split="test")
    alone = predict_to_file(predictor, inputs, tmp_path / "alone.json", adapt="batch:1").images
    plain = predict_to_file(predictor, inputs, tmp_path / "plain.json").images
    for image, other in zip(alone, plain):
        one, two = image["objects"][0], other["objects"][0]
        assert one["label"] == two["label"] and one["reason"] == two["reason"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-4) and "logits" not in two


def test_the_order_of_files_changes_nothing(fitted, predictor, tmp_path):
    inputs = gather([fitted[1]], split="test")
    turned = gather(list(reversed(inputs.paths)))
    turned = type(turned)(turned.paths, inputs.entries, {}, {}, columns=inputs.columns)
    for adapt in ("group:site", "folder", "batch:4"):
        one, two = (
            predict_to_file(predictor, i, tmp_path / f"{n}{adapt[:5]}.json", adapt=adapt)
            for n, i in (("a", inputs), ("b", turned))
        )
        by_file = {image["file"]: image for image in two.images}
        strip = lambda image: {k: v for k, v in image.items() if k != "digest"}  # noqa: E731
        assert all(strip(by_file[image["file"]]) == strip(image) for image in one.images)


@pytest.mark.parametrize("name", ["json", "csv"])
def test_continued_with_more_images_it_equals_one_call(fitted, predictor, tmp_path, monkeypatch, name):
    """What was there is adapted to the images that came later, and no image is looked at twice."""
    inputs = gather([fitted[1]], split="test")
    first = type(inputs)(inputs.paths[:5], inputs.entries, {}, {}, columns=inputs.columns)
    out, seen, original = tmp_path / f"out.{name}", [], Predictor.predict_files
    monkeypatch.setattr(Predictor, "predict_files", lambda self, paths, *rest: original(self, seen.extend(paths) or paths, *rest))
    predict_to_file(predictor, first, out, adapt="folder")
    predict_to_file(predictor, inputs, out, adapt="folder")
    assert len(seen) == 12
    predict_to_file(predictor, inputs, tmp_path / f"once.{name}", adapt="folder")
    assert out.read_bytes() == (tmp_path / f"once.{name}").read_bytes()
    with pytest.raises(L2R2Error, match="a different settings"):
        predict_to_file(predictor, inputs, out)


def test_many_images_in_memory_are_adapted_as_files_are(fitted, predictor, tmp_path):
    inputs = gather([fitted[1]], split="test")
    boxes = [inputs.entries[str(path)].boxes for path in inputs.paths]
    images = [Image.open(path) for path in inputs.paths]
    found = predictor.predict_many(images, boxes, groups=["a"] * 12)
    report = predict_to_file(predictor, inputs, tmp_path / "out.json", adapt="folder")
    for prediction, image in zip(found, report.images):
        assert prediction.label == image["objects"][0]["label"]
        assert prediction.objects[0].score == pytest.approx(image["objects"][0]["score"], abs=1e-6)
        assert prediction.objects[0].logits is None
    assert predictor.predict_many(images[:2], boxes[:2]) == predictor(images[:2], boxes[:2])
    with pytest.raises(L2R2Error, match="1 groups for 2 images"):
        predictor.predict_many(images[:2], boxes[:2], groups=["a"])


def test_images_without_an_object_and_failures_pass_through(fitted, predictor, tmp_path):
    inputs = gather([fitted[1]], split="test")
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    entries = {name: entry for i, (name, entry) in enumerate(inputs.entries.items()) if i % 3}
    some = type(inputs)((*inputs.paths, bad), entries, {}, {})
    report = predict_to_file(predictor, some, tmp_path / "out.json", adapt="batch:50")
    plain = predict_to_file(predictor, some, tmp_path / "plain.json")
    assert [f["file"] for f in report.failures] == [str(bad)] and report.sources == plain.sources
    for image, other in zip(report.images[:-1], plain.images):
        if other["objects"][0]["source"] == "full":
            assert image["objects"] == other["objects"]


def test_evaluate_shows_the_shift_and_the_adapted_fusion(fitted):
    run, data = fitted
    plain = evaluate_run(run, data, "test")
    assert set(plain.shares) == {"test"} and 0 <= plain.shares["test"]["low"] <= plain.shares["test"]["high"] <= 1
    assert set(evaluate_run(run, data, "test", group="site").shares) == {"", "A", "B"}
    adapted = judge_run(run, data, "test", adapt="batch:50")
    expected = fuse_groups(adapted.checkpoint.model.fusion, adapted.data.logits, adapted.data.has_fg, ["1"] * 12)
    assert torch.equal(adapted.outputs[adapted.answer], expected.logits)
    result = CliRunner().invoke(app, ["evaluate", str(run), str(data), "--adapt", "group:site"])
    assert result.exit_code == 0 and "of backgrounds mislead (" in result.output, result.output


def test_predict_prints_the_shift_of_each_group(fitted, tmp_path):
    run, data = fitted
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["predict", str(run), str(data), "--split", "test", "-o", str(out), "--adapt", "group:site"])
    assert result.exit_code == 0, result.output
    assert "A: " in result.output and "of backgrounds mislead (" in result.output
    assert json.loads(out.read_text())["settings"]["adapt"] == "group:site"


@pytest.mark.parametrize("text", ["group", "group:", "batch", "batch:0", "batch:-1", "batch:x", "site", ""])
def test_a_grouping_that_is_none_is_a_sentence(text):
    with pytest.raises(L2R2Error, match="group:COLUMN, folder, sequence:SECONDS, sequence:SECONDS:COLUMN, batch:N or off"):
        Grouping.parse(text)


def test_batches_follow_the_names_and_keep_an_image_together():
    batch = Grouping.parse("batch:2")
    assert batch.of(["c", "a", "b", "a"], [{}] * 4) == ["2", "1", "1", "1"]
    assert Grouping.parse("folder").of([os.path.join("x", "a"), os.path.join("y", "a")], [{}] * 2) == ["x", "y"]
    assert Grouping.parse("off") is None
    with pytest.raises(L2R2Error, match='has the column "site" in its metadata; there are place'):
        Grouping.parse("group:site").of(["a"], [{"place": "1"}])


def test_what_cannot_be_adapted_is_a_sentence(fitted, tmp_path):
    unfitted = write_run(tmp_path / "unfitted")
    inputs = gather([fitted[1]], split="test")
    with pytest.raises(L2R2Error, match="fit it with `l2r2 fuse`"):
        predict_to_file(Predictor.from_pretrained(unfitted), inputs, tmp_path / "out.json", adapt="folder")
    with pytest.raises(L2R2Error, match="fit it with `l2r2 fuse`"):
        evaluate_run(unfitted, fitted[1], "test", adapt="folder")
    assert evaluate_run(unfitted, fitted[1], "test").shares == {}
    with pytest.raises(L2R2Error, match="one branch"):
        evaluate_run(write_run(tmp_path / "plain", branches=("full",)), fitted[1], "test", adapt="folder")

"""Sequences by EXIF time, and one prediction per group of images."""

import csv
import json
from datetime import datetime, timedelta

import pytest
from conftest import sentence
from PIL import Image

from l2r2_models import L2R2Error
from l2r2_models.fusion import Grouping
from l2r2_models.images import taken_at
from l2r2_models.predict.groups import with_groups

START = datetime(2026, 5, 1, 23, 59, 30)


def photo(path, seconds=None, part="", original=True):
    path.parent.mkdir(exist_ok=True, parents=True)
    exif = Image.Exif()
    if seconds is not None:
        text = (START + timedelta(seconds=seconds)).strftime("%Y:%m:%d %H:%M:%S")
        if original:
            exif.get_ifd(0x8769)[0x9003] = text
            exif.get_ifd(0x8769)[0x9291] = part
        else:
            exif[0x0132] = text
    Image.effect_noise((60, 40), 80).convert("RGB").save(path, exif=exif)
    return path


def test_the_time_is_that_of_the_exposure(tmp_path):
    first, later = photo(tmp_path / "a.jpg", 0), photo(tmp_path / "b.jpg", 45, part="25")
    assert taken_at(later) - taken_at(first) == 45.25  # past midnight
    assert taken_at(photo(tmp_path / "c.jpg", 10, original=False)) - taken_at(first) == 10
    assert taken_at(photo(tmp_path / "d.jpg")) is None and taken_at(tmp_path / "none.jpg") is None
    (tmp_path / "e.jpg").write_bytes(b"no image")
    assert taken_at(tmp_path / "e.jpg") is None


def test_a_sequence_ends_at_a_gap_and_stays_in_its_folder_or_site(tmp_path):
    times = {"a/3": 75, "a/1": 0, "a/2": 60, "a/4": 200, "b/1": 61, "b/2": None, "b/3": None}
    paths = [str(photo(tmp_path / f"{name}.jpg", seconds)) for name, seconds in times.items()]
    sites = [{"site": "x"}] * 7

    def sequences(form, order=1):
        found = dict(zip(paths[::order], Grouping.parse(form).of(paths[::order], sites)))
        return {
            tuple(name for path, name in zip(paths, times) if found[path] == group)
            for group in dict.fromkeys(found[p] for p in paths)
        }

    alone = {("b/2",), ("b/3",)}  # without a time
    assert sequences("sequence:60") == {("a/3", "a/1", "a/2"), ("a/4",), ("b/1",), *alone}
    assert sequences("sequence:60", -1) == sequences("sequence:60")  # whatever their order
    assert sequences("sequence:59") == {("a/1",), ("a/3", "a/2"), ("a/4",), ("b/1",), *alone}
    assert sequences("sequence:60:site") == {("a/3", "a/1", "a/2", "b/1"), ("a/4",), *alone}
    assert str(Grouping.parse("sequence:60:site")) == "sequence:60:site" and str(Grouping.parse("sequence:1.5")) == "sequence:1.5"
    with pytest.raises(L2R2Error, match=r"b/2\.jpg: has no time in its EXIF data"):
        Grouping.parse("sequence:60").of(paths[-2:], sites[-2:])
    for wrong in ("sequence", "sequence:", "sequence:0", "sequence:-1", "sequence:nan", "sequence:inf", "sequence:site"):
        with pytest.raises(L2R2Error, match="Unknown grouping"):
            Grouping.parse(wrong)


def record(name, label, score, found=True):
    return {"file": name, "image": {"label": label, "score": score}, "objects": [{"fg": {}} if found else {}]}


def test_the_label_of_a_group_is_the_sum_of_what_its_images_say():
    images = [record("1", "dog", 0.9), record("2", "fox", 0.5), record("3", "fox", 0.6), record("4", "cat", 1.0, found=False)]
    images += [record("5", "cat", 0.8, found=False), record("6", "unknown", 0.3), {"file": "7", "failure": "damaged"}]
    groups = {**dict.fromkeys("1234", "a"), **dict.fromkeys("5", "b"), **dict.fromkeys("6", "c"), **dict.fromkeys("7", "d")}
    answers = {r["file"]: r["group"] for r in with_groups(lambda: iter(images), groups)}
    fox = {"name": "a", "label": "fox", "score": pytest.approx(1.1 / 3), "reason": "fox in 2 of 3 images"}
    assert all(answers[name] == fox for name in "1234")  # the empty image does not count
    assert answers["5"] == {"name": "b", "label": "cat", "score": 0.8, "reason": "cat in 1 of 1 images"}
    assert (answers["6"]["label"], answers["6"]["score"]) == ("unknown", 0.0) and answers["7"] == {"name": "d"}


def test_predict_gives_every_image_the_answer_of_its_sequence(run, tmp_path, l2r2):
    paths = [photo(tmp_path / "photos" / f"{i}.jpg", seconds) for i, seconds in enumerate((0, 5, 300))]
    command = ("predict", run, tmp_path / "photos", "--store-logits", "--group", "sequence:60", "-o", tmp_path / "out.json")
    (tmp_path / "boxes.json").write_text(json.dumps({str(path): [[5, 5, 40, 30]] for path in paths}))
    assert l2r2(*command, "--boxes", tmp_path / "boxes.json").returncode == 0
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert [image["group"]["name"] for image in images] == [str(paths[0])] * 2 + [str(paths[2])]
    assert images[0]["group"] == images[1]["group"] and images[2]["group"]["label"] == images[2]["image"]["label"]
    again = ("fuse", "--predictions", tmp_path / "out.json", "--method", "average", "-o", tmp_path / "again.csv")
    assert l2r2(*again).returncode == 0
    rows = list(csv.DictReader((tmp_path / "again.csv").read_text().splitlines()))
    assert [row["group"] for row in rows] == [image["group"]["name"] for image in images]
    assert rows[2]["group_label"] == rows[2]["image_label"] and rows[2]["group_score"] == rows[2]["image_score"]
    photo(tmp_path / "photos" / "3.jpg", 301)  # a new photo joins its sequence when the command is run again
    assert l2r2(*command, "--boxes", tmp_path / "boxes.json").returncode == 0
    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert images[3]["group"]["name"] == images[2]["group"]["name"] == str(paths[2])
    wrong = l2r2("predict", run, tmp_path / "photos", "--group", "site", "-o", tmp_path / "x.json")
    assert 'No image has the column "site"' in sentence(wrong)

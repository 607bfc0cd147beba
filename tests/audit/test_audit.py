"""The whole audit: its result for models that are known to use only the object or only the background, and invalid input."""

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from audit_cases import GROUNDS, OBJECTS, write_data, write_model
from conftest import sentence, write_dataset, write_run
from PIL import Image

from l2r2_models import L2R2Error
from l2r2_models.audit import audit as audit_module
from l2r2_models.audit import run_model
from l2r2_models.audit import samples as audit_images
from l2r2_models.audit.audit import audit
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.evaluator import evaluate_run
from l2r2_models.io import file_sha256
from l2r2_models.runs import read_audits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is stored outside of the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", 12)


def values(result):
    return {a: {n: (f.value, f.low, f.high) for n, f in figures.items()} for a, figures in result.answers.items()}


@pytest.mark.parametrize("masks", [True, False])
def test_a_model_of_the_object_and_one_of_the_background_get_opposite_verdicts(tmp_path, masks):
    data = write_data(tmp_path / "masked", masks=masks)
    middle = audit(write_model(tmp_path / "middle", "middle"), data)
    corner = audit(write_model(tmp_path / "corner", "corner"), data)
    assert middle.verdict.endswith("loses nothing: the object decides.")
    assert corner.verdict.endswith("the background decides many of its predictions.")
    m, c = middle.answers["full"], corner.answers["full"]
    assert m["accuracy"].value == c["accuracy"].value == 1
    assert m["bg_gap"].value == 0 and c["bg_gap"].low > 0.4 and c["bg_gap"].value == pytest.approx(2 / 3, abs=0.15)
    assert m["challenge_upper_bound"].value == 1 and c["challenge_upper_bound"].value < 0.2 and c["mixed_next"].value == 0
    assert m["fg_only"].value == 1 and c["fg_only"].value == pytest.approx(1 / 3)
    assert m["bg_only_box"].value == pytest.approx(1 / 3) and c["bg_only_box"].value == 1
    assert m["drop_tiled"].value == 1 and c["drop_tiled"].value == 0
    assert m["rfs"].value == pytest.approx(1) and c["rfs"].value == pytest.approx(-1)
    assert m["irfs"].value > 0.1 and c["irfs"].value < -0.1
    assert ("bg_only_mask" in m) == masks
    assert any("no masks" in w for w in middle.warnings) != masks


def test_metrics_depend_on_the_seed_but_not_on_batches_or_the_order_of_rows(tmp_path, data):
    model = write_model(tmp_path / "corner", "corner")
    first = audit(model, data, batch_size=32, group="site")
    assert values(audit(model, data, batch_size=5, group="site", work=tmp_path / "other")) == values(first)
    head, *rows = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([head, *reversed(rows)]) + "\n")
    assert values(audit(model, data, group="site", work=tmp_path / "third")) == values(first)
    assert values(audit(model, data, seed=1, group="site")) != values(first)
    assert set(first.answers["full"]) >= {"group: a", "group: b", "worst_group"}


def test_a_killed_audit_continues_where_it_was(tmp_path, data):
    model = write_model(tmp_path / "corner", "corner")
    seen, stored = [], {}

    def killed(items, total, text):
        for i, item in enumerate(items):
            if text == "changing images" and i == 7:
                stored.update({file: file.read_bytes() for file in (model / "audit").iterdir()})
                raise KeyboardInterrupt
            yield item

    def counted(items, total, text):
        seen.append((text, total))
        return items

    with pytest.raises(KeyboardInterrupt):
        audit(model, data, progress=killed)
    for file, content in stored.items():  # as a killed process leaves it, which stores nothing at its end
        file.write_bytes(content)
    continued = audit(model, data, progress=counted)
    assert ("changing images", 5) in seen
    assert values(continued) == values(audit(model, data, work=tmp_path / "fresh"))
    again = audit(model, data, progress=counted)
    assert seen[-1] == ("changing images", 0) and values(again) == values(continued)
    for file in (model / "audit").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert values(audit(model, data, progress=counted)) == values(continued) and seen[-1] == ("changing images", 12)


def test_other_weights_or_images_never_reuse_what_is_stored(tmp_path, data):
    work = tmp_path / "work"
    before = audit(write_model(tmp_path / "corner", "corner"), data, work=work)
    assert values(audit(write_model(tmp_path / "middle", "middle"), data, work=work, limit=12)) != values(before)
    assert len(list(work.iterdir())) == 2
    Image.new("RGB", (32, 32), (60, 200, 200)).save(data / "images" / "001.png")  # a green one on the ground of red
    after = audit(tmp_path / "corner", data, work=work)
    assert after.answers["full"]["accuracy"].value < before.answers["full"]["accuracy"].value and len(list(work.iterdir())) == 3


def test_a_work_folder_that_cannot_be_written_does_not_stop_the_audit(tmp_path, data, caplog):
    (tmp_path / "file").write_text("in the way")
    assert audit(write_model(tmp_path / "middle", "middle"), data, work=tmp_path / "file" / "x", limit=2).images == 2
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_a_run_is_audited_by_branch_and_fused(tmp_path):
    data, run = write_dataset(tmp_path / "set", 6, ("test",)), write_run(tmp_path / "run")
    result = audit(run, data)
    assert tuple(result.answers) == ("full", "fg", "fused")
    judged = evaluate_run(run, data, "test")
    for name, row in (("full", "full"), ("fg", "fg"), ("fused", "fused: robust")):
        assert result.answers[name]["accuracy"].value == pytest.approx(judged.rows[row]["accuracy"])
    assert list((run / "audit").iterdir())
    only = audit(write_run(tmp_path / "plain", branches=("full",)), data, limit=2)
    three = audit(write_run(tmp_path / "three", branches=("full", "fg", "bg")), data, limit=2)
    assert tuple(only.answers) == ("full",) and tuple(three.answers) == ("full", "fg", "fused") and three.images == 2


def test_images_without_an_object_or_a_background_are_left_out_and_counted(tmp_path):
    data = write_data(tmp_path / "masked", 9, masks=True)
    Image.new("L", (32, 32), 0).save(data / "masks" / "000.png")
    Image.new("L", (32, 32), 255).save(data / "masks" / "001.png")
    text = (data / "metadata.csv").read_text().replace("002.png,blue,test,8,8,24,24,masks/002.png", "002.png,blue,test,,,,,")
    (data / "metadata.csv").write_text(text)
    result = audit(write_model(tmp_path / "middle", "middle"), data)
    assert result.images == 6
    assert result.left_out == {"empty mask": 1, "object fills the image": 1, "no box or mask": 1}
    assert "1 of 9 images left out: empty mask." in result.warnings
    assert all(f.value == f.value for f in result.answers["full"].values())


def test_a_lent_background_shows_no_object_of_another_row(tmp_path, data):
    table = read_table(data)
    first, second = table.rows[:2]
    pixels = np.array(Image.open(first.path))
    pixels[:6, :6] = OBJECTS[second.label]
    Image.fromarray(pixels).save(first.path)
    corner = replace(second, path=first.path, entry=replace(second.entry, boxes=((0.0, 0.0, 6.0, 6.0),)))
    rows = replace(table, rows=(first, corner, *table.rows[2:]))
    options = dict(seed=0, skip_bad=False, progress=lambda items, *_: items)
    for limit in (None, 1, 2, 3, 4, 5, 6):
        subjects = audit_images.find_subjects(rows, (0, 0, 0), 0.2, limit=limit, **options)
        lent = [subjects._background(i) for i, row in enumerate(subjects.table.rows) if row.path == first.path]
        ground = torch.tensor(GROUNDS[first.label])
        assert all(((background - ground).abs() <= 10).all() for background in lent)


def test_large_images_are_shrunk_with_their_boxes_and_masks(tmp_path, monkeypatch):
    model = write_model(tmp_path / "middle", "middle")
    data = write_data(tmp_path / "large", 6, masks=True, side=128)
    monkeypatch.setattr(audit_images, "MOST_PIXELS", 64 * 64)
    subject = audit_images.subject_of("a", read_table(data).rows[0], (0, 0, 0), 0.2)
    assert subject.pixels.shape == (64, 64, 3) and subject.mask.shape == (64, 64)
    assert subject.boxes.tolist() == [[16, 16, 48, 48]]
    assert subject.mask.float().mean() == pytest.approx(3.14159 / 16, rel=0.05)
    assert (subject.pixels[subject.mask].float().mean(0)[0]) > 200  # the mask lies on the red object
    result = audit(model, data)
    assert result.answers["full"]["accuracy"].value == 1 and result.answers["full"]["mixed_rand"].value == 1


def test_one_class_and_few_images_have_verdicts(tmp_path, data):
    model = write_model(tmp_path / "corner", "corner")
    head, *rows = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([head, *(row for row in rows if ",red," in row)]) + "\n")
    result = audit(model, data)
    assert "bg_gap" not in result.answers["full"] and "swap_loss" not in result.answers["full"]
    assert result.verdict.startswith("Only 4 images") and any("the same class" in w for w in result.warnings)
    assert audit(model, data, limit=1).images == 1


def test_a_corrupt_image_is_named_or_with_skip_bad_left_out(tmp_path, data):
    model = write_model(tmp_path / "middle", "middle")
    (data / "images" / "003.png").write_bytes(b"PK\x03\x04")
    with pytest.raises(L2R2Error, match=r"003\.png: is a ZIP archive"):
        audit(model, data)
    assert audit(model, data, skip_bad=True).left_out == {"unreadable": 1}


def test_without_any_box_the_error_says_where_boxes_come_from(tmp_path, data):
    rows = [f"images/{i:03d}.png,{list(OBJECTS)[i % 3]}\n" for i in range(12)]
    (data / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    model = write_model(tmp_path / "middle", "middle")
    with pytest.raises(L2R2Error, match=r"none of the 12 images can be audited \(12 no box or mask\); pass boxes with --boxes"):
        audit(model, data)
    (tmp_path / "boxes.json").write_text(json.dumps({f"{i:03d}.png": [[8, 8, 24, 24]] for i in range(12)}))
    assert audit(model, data, boxes=tmp_path / "boxes.json").images == 12


def test_classes_are_matched_by_name_or_by_a_map(tmp_path, data):
    names = ["Signal_Red", "green", "Blue"]
    model = write_model(tmp_path / "middle", "middle", names)
    with pytest.raises(L2R2Error, match=r"1 class name matches no class of the model: red; pass --classes map.csv"):
        audit(model, data)
    (tmp_path / "map.csv").write_text("class,model_class\nred,signal-red\n")
    assert audit(model, data, classes=tmp_path / "map.csv").answers["full"]["accuracy"].value == 1
    with open(tmp_path / "map.csv", "a", newline="") as file:
        csv.writer(file).writerow(("green", "Signal_Red"))
    with pytest.raises(L2R2Error, match="two classes of the data match its class Signal_Red"):
        audit(model, data, classes=tmp_path / "map.csv")
    (tmp_path / "map.csv").write_text("a,b\n1,2\n")
    with pytest.raises(L2R2Error, match=r"map\.csv: every row needs class and model_class"):
        audit(model, data, classes=tmp_path / "map.csv")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    assert audit(model, data, labels=tmp_path / "names.txt").answers["full"]["accuracy"].value == 1


def test_logits_that_are_not_finite_are_an_error(tmp_path, data, monkeypatch):
    load = audit_module.load_audited

    def broken(*arguments):
        model = load(*arguments)
        torch.nn.init.constant_(model.network.fc.weight, float("nan"))
        return replace(model)

    monkeypatch.setattr(audit_module, "load_audited", broken)
    with pytest.raises(L2R2Error, match="its training has diverged"):
        audit(write_model(tmp_path / "middle", "middle"), data)


class Page(HTMLParser):
    """Counts tags, and collects what would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith(("data:", "#"))]


def test_the_command_prints_a_table_or_json_and_writes_one_page(l2r2, tmp_path):
    data = write_data(tmp_path / "data")
    model = write_model(tmp_path / "corner", "corner")
    result = l2r2("audit", model, data, "--group", "site", "--report", tmp_path / "audit.html")
    assert result.returncode == 0, result.stderr
    assert "BG-Gap" in result.stdout and "worst site" in result.stdout and "the background decides" in result.stdout
    text = (tmp_path / "audit.html").read_text()
    page = Page(text)
    assert page.tags.count("details") == 2 and "Mixed-Same, Mixed-Rand and Mixed-Next" in text
    assert not page.links and page.tags.count("img") >= 18 and "script" not in page.tags and "site" in text
    found = json.loads(l2r2("audit", model, data, "--json").stdout)
    assert found["answers"]["full"]["bg_gap"]["low"] > 0.4 and found["images"] == 24 and found["verdict"] in result.stdout
    (stored,) = read_audits(model, file_sha256(model / "model.safetensors"))  # for the model card
    assert stored == {"data": "data", "weights": stored["weights"], **found}


def test_the_command_refuses_what_it_cannot_use(l2r2, tmp_path, data):
    model = write_model(tmp_path / "middle", "middle")
    assert 'timm has no model "resnat"' in sentence(l2r2("audit", "timm:resnat", data))
    assert "its pretrained weights cannot be loaded" in sentence(l2r2("audit", "timm:audit_middle", data))
    assert "neither a run nor a checkpoint" in sentence(l2r2("audit", data, data))
    assert "hf download nobody/nothing" in sentence(l2r2("audit", "nobody/nothing", data))
    assert 'no image has the split "val"' in sentence(l2r2("audit", model, data, "--split", "val"))
    assert 'no column "place"' in sentence(l2r2("audit", model, data, "--group", "place"))
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are never loaded" in sentence(l2r2("audit", model, data))
    (model / "pytorch_model.bin").unlink()
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    assert "2 class names for 3 classes" in sentence(l2r2("audit", model, data, "--labels", tmp_path / "names.txt"))
    assert l2r2("audit", model, data, "--limit", 0).returncode == 2
    assert l2r2("audit", model, data, "--seed", 2**64).returncode == 2


def test_the_challenge_tries_every_background_and_a_sample_is_an_upper_bound(tmp_path):
    data, model = write_data(tmp_path / "data", 9), write_model(tmp_path / "corner", "corner")
    shown = []
    seen = run_model._logits

    def count(audited, views):
        shown.append(len(views.has_fg))
        return seen(audited, views)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_model, "_logits", count)
        plain = audit(model, data, backgrounds=1)
        before = sum(shown)
        full = audit(model, data, backgrounds=1, challenge=True, batch_size=1)
    assert "challenge" not in plain.answers["full"]
    figures = full.answers["full"]
    assert figures["challenge"].value == 0 <= figures["challenge_upper_bound"].value  # some background fools each object
    assert figures["challenge_upper_bound"].value == plain.answers["full"]["challenge_upper_bound"].value
    assert 9 <= sum(shown) - 2 * before < 9 * 8  # it stops with the first that does
    middle = audit(write_model(tmp_path / "middle", "middle"), data, backgrounds=1, challenge=True)
    assert middle.answers["full"]["challenge"].value == 1

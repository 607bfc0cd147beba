"""The audit on the page, without a browser: the same result as the command, its report, and sentences about what is wrong."""

import shutil
from pathlib import Path

import pytest
from audit_cases import write_data
from explain_cases import write_spots
from html_pages import Page

from l2r2_models import L2R2Error, Predictor
from l2r2_models.app import markup
from l2r2_models.app.audited import Folder, save_report
from l2r2_models.app.handlers import auditing
from l2r2_models.audit.audit import run_audit
from l2r2_models.report.audit import examples


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("audited")
    write_spots(place / "run")
    write_data(place / "data")
    return place


@pytest.fixture
def folder(place):
    return Folder(str(place / "run"), place / "data")


def steps():
    """A progress that remembers what it was told."""
    told = []

    def progress(items, total, words):
        for done, item in enumerate(items):
            told.append((done, total, words))
            yield item

    return told, progress


def test_the_result_is_that_of_the_command(place, folder):
    told, progress = steps()
    run = folder.audit("test", 20, progress)
    expected = run_audit(place / "run", place / "data", split="test", limit=20)
    assert run.result == expected.result and run.result.images == 20
    assert (0, 20, "finding objects") in told
    page = Page(markup.audit(run))
    assert all(verdict in page.words for verdict in run.result.verdicts.values())
    assert len(page.images) >= 12 and "What is this?" in page.words
    report = save_report(run, place)
    assert report.startswith(str(place)) and run.result.verdict in Path(report).read_text()


def test_the_page_says_what_each_output_predicts(place):
    run = run_audit(place / "run", place / "data", split="test", limit=20)
    predictor = Predictor.from_pretrained(place / "run")
    cards = examples(run)
    shown = [card for card in cards if card.title.endswith(": unchanged")]
    assert len(shown) == 3 and len({card.note for card in cards}) == 3
    for card in shown:
        found = predictor(place / "data" / card.note, boxes=[card.box]).objects[0]
        said = {name: words.partition(",")[0] for name, words, _ in card.answers}
        assert said == {"full": found.full.label, "fg": found.fg.label, "fused": found.label}
    for card in (card for card in cards if "of another class" in card.title):
        (_, full, right), (_, fg, kept), _ = card.answers  # full says the class of the ground, fg that of the object
        assert not right and kept and fg.startswith(card.title.partition(":")[0]) and not full.startswith(fg.partition(",")[0])


def test_the_suggested_split(place, tmp_path):
    assert Folder("run", place / "data").split == "test"
    for name in ("train", "val"):
        shutil.copytree(place / "data", tmp_path / name)
        text = (tmp_path / name / "metadata.csv").read_text().replace(",test,", f",{name},", 12)
        (tmp_path / name / "metadata.csv").write_text(text)
        assert Folder("run", tmp_path / name).split == "test"
    plain = tmp_path / "plain"
    shutil.copytree(place / "data" / "images", plain / "red")
    assert Folder("run", plain).split is None and Folder("run", plain).splits == ()


@pytest.mark.parametrize(
    ("split", "images", "words"),
    [("train", 20, "no such split; choose from test"), (None, 20, "no such split"), ("test", 10**6, "Choose 20, 50, 100 or 200")],
)
def test_what_a_browser_must_not_send_is_one_sentence(folder, split, images, words):
    with pytest.raises(L2R2Error, match=words):
        folder.audit(split, images, lambda items, *_: items)


def test_a_folder_that_cannot_be_audited_is_one_sentence_on_the_page(place, tmp_path):
    shutil.copytree(place / "data" / "images", tmp_path / "data" / "red")
    handler = auditing(Folder(str(place / "run"), tmp_path / "data"), tmp_path)
    notice, result, _ = handler(None, 20)
    assert "none of the 20 images can be audited" in notice and "Traceback" not in notice and result == ""
    with pytest.raises(L2R2Error, match="no such folder"):
        Folder(str(place / "run"), tmp_path / "missing")

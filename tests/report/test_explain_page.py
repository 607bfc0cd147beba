"""`l2r2 explain` and its page: the order of the pictures, means over all images, one sentence for invalid input."""

import json

import pytest
from audit_cases import write_data
from explain_cases import write_spots
from html_pages import EVIL, Page
from PIL import Image
from typer.testing import CliRunner

from l2r2_cli.commands import app
from l2r2_models import Explainer, L2R2Error
from l2r2_models.report.explain import Page as Collected
from l2r2_models.report.explain import card


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    return write_spots(folder / "run"), write_data(folder / "data", 6)


def explain(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_a_folder_becomes_a_page_with_numbers_and_pictures(case, tmp_path):
    run, data = case
    result = explain(run, data, "-o", tmp_path / "p.html", "--shown", 2, "--json")
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert len(page.images) == 2 * 7  # image, full, the cut, its map, that on the image, fused, swapped
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    for words in (
        "2 of 6, most disagreement of full and fg first",
        "background swapped",
        "a flat map",
        "6 of 6 are correct",
    ):
        assert words in page.words
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 6 and rows[0]["truth"] == rows[0]["objects"][0]["label"]
    assert rows[0]["changes"]["swapped"]["full"] < 0.5 < rows[0]["changes"]["swapped"]["fg"]


def test_one_image_and_the_same_page_every_time(case, tmp_path):
    run, data = case
    pages = []
    for name in ("a.html", "b.html"):
        result = explain(run, data / "images" / "000.png", "-o", tmp_path / name, "--against", "runner-up")
        assert result.exit_code == 0, result.output
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1] and "why red and not " in pages[0] and "no box was given" in pages[0]


def test_the_order_of_the_pictures(case):
    run, data = case
    explainer = Explainer.from_pretrained(run, numbers=False)
    images = [Image.open(data / "images" / f"{i:03d}.png").convert("RGB") for i in range(3)]
    found = [explainer(image, [[8, 8, 24, 24]], truth="blue", name=f"image {i}") for i, image in enumerate(images)]
    assert found[2].error < 1 < found[0].error
    for sort, key in (("error", lambda f: f.error), ("outside", lambda f: f.outside), ("disagreement", lambda f: f.disagreement)):
        page = Collected(sort, most=2)
        for one in found:
            page.add(one)
        shown = [str(markup) for *_, markup in sorted(page._cards, reverse=True)]
        assert shown == [card(f) for f in sorted(found, key=key, reverse=True)[:2]], sort


def test_names_of_users_are_shown_and_never_run(case, tmp_path):
    run, _ = case
    found = Explainer.from_pretrained(run, numbers=False)(Image.new("RGB", (32, 32)), [[8, 8, 24, 24]], truth=EVIL, name=EVIL)
    page = Collected()
    page.add(found)
    page.write(tmp_path / "p.html", EVIL)
    words = Page((tmp_path / "p.html").read_text())
    assert "script" not in words.tags and words.words.count(EVIL) >= 3


def test_a_damaged_image_is_named_and_the_others_go_on(case, tmp_path):
    run, data = case
    good, bad = data / "images" / "001.png", tmp_path / "bad.png"
    bad.write_bytes(b"PK")
    result = explain(run, bad, good, "-o", tmp_path / "p.html")
    assert result.exit_code == 1 and "bad.png: is a ZIP archive" in result.output
    assert "1 image could not be explained" in (tmp_path / "p.html").read_text()
    alone = explain(run, bad, "-o", tmp_path / "none.html")
    assert alone.exit_code == 1 and not (tmp_path / "none.html").exists()
    assert isinstance(alone.exception, L2R2Error) and "no image could be explained" in str(alone.exception)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sort", "size"], 'Unknown order "size"; choose from disagreement'),
        (["--sort", "error"], "has no label, which --sort error needs"),
    ],
)
def test_bad_options_are_sentences(case, tmp_path, options, sentence):
    run, data = case
    result = explain(run, data / "images" / "000.png", "-o", tmp_path / "p.html", *options)
    assert result.exit_code == 1 and sentence in str(result.exception)


def test_boxes_come_from_a_localizer_or_a_file(case, tmp_path):
    run, data = case
    image = data / "images" / "000.png"
    (tmp_path / "boxes.csv").write_text(f"file_name,x0,y0,x1,y1\n{image},8,8,24,24\n")
    for options in (["--localizer", "center?share=0.5"], ["--boxes", tmp_path / "boxes.csv"]):
        result = explain(run, image, "-o", tmp_path / "p.html", "--no-numbers", *options)
        assert result.exit_code == 0, result.output
        assert "what fg sees" in (tmp_path / "p.html").read_text()


def test_an_interrupted_explanation_continues_to_the_same_page(case, tmp_path, monkeypatch):
    run, data = case
    assert explain(run, data, "-o", tmp_path / "whole.html", "--shown", 2).exit_code == 0
    seen, original = [], Explainer.__call__

    def interrupted(self, *arguments, name=None, **options):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(name)
        return original(self, *arguments, name=name, **options)

    def watched(self, *arguments, name=None, **options):
        seen.append(name)
        return original(self, *arguments, name=name, **options)

    command = (run, data, "-o", tmp_path / "p.html", "--shown", 2, "--json")
    monkeypatch.setattr(Explainer, "__call__", interrupted)
    assert explain(*command).exit_code != 0 and not (tmp_path / "p.html").exists()
    monkeypatch.setattr(Explainer, "__call__", watched)
    with open(next((tmp_path / "p.html.parts").iterdir()), "a") as part:
        part.write('{"file": "half a li')  # as a kill leaves it
    result = explain(*command)
    assert result.exit_code == 0, result.output
    assert len(seen) == len(set(seen)) == 6 and len(result.stdout.splitlines()) == 6  # no image twice, all in the output
    assert (tmp_path / "p.html").read_text() == (tmp_path / "whole.html").read_text()
    assert not (tmp_path / "p.html.parts").exists()


def test_what_was_explained_with_other_settings_is_not_continued(case, tmp_path, monkeypatch):
    run, data = case
    original, count = Explainer.__call__, []

    def interrupted(self, *arguments, **options):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Explainer, "__call__", interrupted)
    assert explain(run, data, "-o", tmp_path / "p.html", "--no-numbers").exit_code != 0
    result = explain(run, data, "-o", tmp_path / "p.html", "--no-numbers", "--method", "ig")
    assert result.exit_code == 0 and "before the interruption" not in result.output and len(count) == 3 + 6

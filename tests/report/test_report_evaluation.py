"""The page of `l2r2 evaluate --report`: its sentences match the metrics, and the disagreements are the right ones."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import write_dataset, write_run
from html_pages import EVIL, Page

from l2r2_models.evaluate.evaluator import evaluation_of, judge_run
from l2r2_models.report.evaluation import write_evaluation
from l2r2_models.report.explanations import anchor_of


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """24 images of red, green, blue in turn; what the branches say of them is set by the tests."""
    folder = tmp_path_factory.mktemp("judged")
    data = write_dataset(folder / "data", 24, splits=("test",))
    return judge_run(write_run(folder / "run"), data, "test", group="label")


def saying(judged, **answers):
    """Every output given by its answers [N] and how sure it is of them [N] (or one number)."""
    outputs = {}
    for name, (answer, sure) in answers.items():
        logits = torch.full((24, 3), 0.0)
        sure = torch.as_tensor(sure, dtype=torch.float).expand(24)
        logits[torch.arange(24), answer] = (2 * sure / (1 - sure)).log()
        outputs["fused: robust" if name == "fused" else name] = logits
    return replace(judged, outputs=outputs)


def page_of(judged, tmp_path):
    write_evaluation(tmp_path / "r.html", [judged], [evaluation_of(judged)])
    return Page((tmp_path / "r.html").read_text(encoding="utf-8"))


def cards(page):
    return re.findall(r"images/test_(\d+)\.png", page.words)


def test_the_disagreements_are_sorted_by_confidence(judged, tmp_path):
    truth = judged.data.labels
    wrong = (truth + 1) % 3
    fused, full = truth.clone(), truth.clone()
    fused[[3, 7, 8]] = wrong[[3, 7, 8]]  # lost: fg is right
    full[[0, 1, 5]] = wrong[[0, 1, 5]]  # won: full is wrong, the fusion right
    both = truth.clone()
    full[11] = fused[11] = both[11] = wrong[11]  # wrong throughout: no disagreement
    sure = torch.full((24,), 0.6)
    sure[[7, 3, 8]], sure[[5, 0, 1]] = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.95, 0.85, 0.75])
    page = page_of(saying(judged, full=(full, sure), fg=(both, 0.5), fused=(fused, sure)), tmp_path)
    lost, won = page.words.index("Wrong although a branch was right"), page.words.rindex("Right although a branch was wrong")
    assert cards(page) == ["007", "003", "008", "005", "000", "001"] and lost < page.words.index("test_007") < won
    assert len(page.images) == 6 and "3 images, 3 of them shown" in page.words
    card = page.words[page.words.index("test_007") - 100 : page.words.index("test_007")]
    labels = [judged.labels[int(i[7])] for i in (truth, full, fused)]
    assert [f"✓ {labels[0]} 50\xa0%" in card, f"✗ {labels[2]} 90\xa0%" in card] == [True, True]


def test_a_failure_seen_often_does_not_fill_the_gallery(judged, tmp_path):
    truth = judged.data.labels
    wrong = (truth + 1) % 3
    page = page_of(saying(judged, full=(truth, 0.5), fg=(truth, 0.5), fused=(wrong, 0.9)), tmp_path)
    assert len(cards(page)) == 6 and "24 images, 6 of them shown" in page.words


def test_the_lead_only_claims_significant_differences(judged, tmp_path):
    truth = judged.data.labels
    wrong = (truth + 1) % 3
    bad, one = wrong.clone(), wrong.clone()
    bad[:2], one[:3] = truth[:2], truth[:3]
    page = page_of(saying(judged, full=(bad, 0.5), fg=(truth, 0.5), fused=(one, 0.5)), tmp_path)
    assert "The fused prediction (robust) is correct in 12.5 % of 24 images" in page.words
    assert "too close to tell from these images" in page.words  # three images against two
    assert "The object alone would be more accurate, by +75.0 to +100.0 points." in page.words
    page = page_of(saying(judged, full=(bad, 0.5), fg=(truth, 0.5), fused=(truth, 0.5)), tmp_path)
    assert "That is +91.7 points" in page.words and "too close" not in page.words and "would be more accurate" not in page.words
    assert "Whenever one of" not in page.words


def test_images_without_an_object_are_shown_wrong_ones_first(judged, tmp_path):
    truth = judged.data.labels
    answers = truth.clone()
    answers[4] = (truth[4] + 1) % 3
    has_fg = torch.ones(24, dtype=torch.bool)
    has_fg[[2, 4]] = False
    said = saying(judged, **dict.fromkeys(("full", "fg", "fused"), (answers, 0.5)))
    page = page_of(replace(said, data=replace(said.data, has_fg=has_fg)), tmp_path)
    assert "In 2 of 24 images; the accuracy is 50.0 % on these, and 100.0 % on the others." in page.words
    assert (
        cards(page) == ["004", "002"]
        and "Whenever one of the branches or the fused prediction (robust) is correct, all of them are." in page.words
    )
    assert "no object found" in page.words


def test_names_of_classes_and_groups_are_escaped(judged, tmp_path):
    odd = replace(judged, labels=(EVIL, "green", "red"), groups=(EVIL,) * 24, group=EVIL)
    page = page_of(odd, tmp_path)
    assert "script" not in page.tags and page.words.count(EVIL) > 10
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)


def test_temperatures_that_do_harm_are_called_so(judged, tmp_path):
    truth = judged.data.labels
    answers = (truth + (torch.arange(24) % 2)) % 3  # half of them right, and half sure: ECE about 0
    said = saying(judged, **dict.fromkeys(("full", "fg", "fused"), (answers, 0.5)))
    harmed = replace(said, fitted_on="val", temperatures=dict.fromkeys(said.outputs, 0.1))
    assert "less calibrated: test differs from val" in page_of(harmed, tmp_path).words
    unchanged = replace(said, fitted_on="val", temperatures=dict.fromkeys(said.outputs, 1.0))
    assert "less calibrated" not in page_of(unchanged, tmp_path).words
    assert "With --fit-split" in page_of(said, tmp_path).words


def test_several_splits_begin_with_a_comparison(judged, tmp_path):
    truth = judged.data.labels
    away = truth.clone()
    away[:6] = (truth[:6] + 1) % 3
    at_home = saying(judged, full=(truth, 0.9), fg=(truth, 0.9), fused=(truth, 0.9))
    elsewhere = replace(saying(judged, full=(away, 0.9), fg=(truth, 0.9), fused=(away, 0.6)), split="new site")
    both = [at_home, elsewhere]
    write_evaluation(tmp_path / "r.html", both, [evaluation_of(one) for one in both])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert (
        "From test to new site, the accuracy changes by \u221225.0 points for full, +0.0 for fg, \u221225.0 for fused."
        in page.words
    )
    assert page.words.index("Home and away") < page.words.index("test: Accuracy") < page.words.index("new site: Accuracy")
    assert "accuracy in % on new site" in page.words and page.words.count("How it was made") >= 2


def test_the_error_rate_of_the_most_confident_is_on_the_page(judged, tmp_path):
    truth = judged.data.labels
    fused, sure = truth.clone(), torch.linspace(0.9, 0.4, 24)
    fused[[2, 20, 21]] = (truth[[2, 20, 21]] + 1) % 3  # of the 19 most confident, one is wrong
    page = page_of(saying(judged, full=(truth, 0.6), fg=(truth, 0.6), fused=(fused, sure)), tmp_path)
    assert "Risk and coverage" in page.words and "The fused prediction (robust) is wrong in 5.3 % of the 80 %" in page.words


def test_images_with_an_explanation_link_to_it(judged, tmp_path):
    labels = judged.data.labels
    wrong = saying(judged, full=(labels, 0.9), fg=((labels + 1) % 3, 0.9), fused=((labels + 1) % 3, 0.9))
    explained = [row.path for row in wrong.data.table.rows[:2]]
    cards = "".join(f'<div class="strip" id="{anchor_of(path)}"></div>' for path in explained)
    (tmp_path / "why.html").write_text(cards)
    write_evaluation(tmp_path / "r.html", [wrong], [evaluation_of(wrong)], explanations=tmp_path / "why.html")
    addresses = Page((tmp_path / "r.html").read_text(encoding="utf-8")).addresses
    links = {address for address in addresses if not address.startswith(("data:", "#"))}
    assert links == {f"why.html#{anchor_of(path)}" for path in explained}

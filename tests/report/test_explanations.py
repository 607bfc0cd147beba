"""Links from the reports of `evaluate` and `audit` to the page of `explain`."""

from pathlib import Path

import pytest
from audit_cases import write_data
from conftest import sentence
from explain_cases import write_spots
from html_pages import Page


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linked")
    return write_spots(folder / "run"), write_data(folder / "data", 6), folder


def links(page):
    return [address for address in Page(page.read_text(encoding="utf-8")).addresses if not address.startswith(("data:", "#"))]


def test_images_of_the_reports_link_to_their_explanations(case, tmp_path, l2r2):
    run, data, _ = case
    (tmp_path / "why").mkdir()
    why = tmp_path / "why" / "it is.html"
    assert l2r2("explain", run, data, "--no-numbers", "--shown", 6, "-o", why).returncode == 0
    report = tmp_path / "reports" / "audit.html"
    assert l2r2("audit", run, data, "--limit", 6, "--report", report, "--explanations", why).returncode == 0
    found = links(report)
    assert found and len(set(found)) == len(found) <= 3  # one per photograph, not per changed version
    text = why.read_text(encoding="utf-8")
    for link in found:
        file, anchor = link.split("#")
        assert (report.parent / file.replace("%20", " ")).resolve() == why.resolve() and text.count(f'id="{anchor}"') == 1
    images = {Path(words).name for words in Page(text).words.split() if words.endswith(".png")}
    assert len(images) == 6


def test_other_pages_are_refused(case, tmp_path, l2r2):
    run, data, _ = case
    split = ("--split", "test")
    plain = ("evaluate", run, data, *split, "--report", tmp_path / "r.html")
    assert l2r2(*plain).returncode == 0 and links(tmp_path / "r.html") == []
    assert "has no explained images" in sentence(l2r2(*plain, "--explanations", tmp_path / "r.html"))
    assert "write it with `l2r2 explain" in sentence(l2r2(*plain, "--explanations", tmp_path / "none.html"))
    assert l2r2("evaluate", run, data, *split, "--explanations", tmp_path / "r.html").returncode == 2

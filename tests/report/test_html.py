"""The page: nothing external, user text escaped, figures that match the numbers."""

import re

import numpy as np
import pytest
import torch
from html_pages import EVIL, Page
from PIL import Image

from l2r2_models import L2R2Error
from l2r2_models.evaluate.metrics import confusion_matrix
from l2r2_models.report.figures import bars_by_group, confusion, reliability_diagram
from l2r2_models.report.html import Picture, Section, gallery, percent, table, write_page


def page_of(tmp_path, *blocks, **options):
    write_page(tmp_path / "r.html", EVIL, EVIL, [Section(EVIL, f"{EVIL}\nsecond line", blocks)], notes=[EVIL], **options)
    return Page((tmp_path / "r.html").read_text(encoding="utf-8"))


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=generator)
    return 3 * torch.randn(60, 3, generator=generator) + 2 * torch.eye(3)[labels], labels


def test_what_users_name_is_shown_and_never_run(tmp_path, logits):
    z, labels = logits
    image = Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8))
    page = page_of(
        tmp_path,
        table([EVIL, EVIL], [[EVIL, EVIL]], caption=EVIL),
        gallery([Picture(image, EVIL, None, [(EVIL, EVIL, True)], EVIL)]),
        bars_by_group({EVIL: {EVIL: 0.5, "": 1.0}}, title=EVIL),
        confusion(z, labels, [EVIL, "b", "c"]),
        reliability_diagram({EVIL: z}, labels),
    )
    assert "script" not in page.tags
    assert page.words.count(EVIL) >= 13 and "(empty)" in page.words
    assert len(page.ids) == len(set(page.ids)) > 5


def test_definitions_are_folded_away_below_the_blocks(tmp_path):
    sections = [Section("s", "text", [table(["a"], [["cell"]])], about=f"{EVIL}\nsecond"), Section("plain", "no definitions")]
    write_page(tmp_path / "r.html", "t", "l", sections)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.tags.count("details") == page.tags.count("summary") == 1 and "script" not in page.tags
    places = [page.words.index(word) for word in ("text", "cell", "What is this?", EVIL, "second", "no definitions")]
    assert places == sorted(places)


def test_a_page_fetches_nothing(tmp_path, logits):
    z, labels = logits
    image = Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8))
    figures = confusion(z, labels, ["a", "b", "c"]), reliability_diagram({"a": z}, labels)
    page = page_of(tmp_path, gallery([Picture(image, "a")]), *figures)
    assert page.addresses and all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    text = (tmp_path / "r.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_figures_take_the_color_of_the_page(logits):
    for figure in (reliability_diagram({"a": logits[0]}, logits[1]), bars_by_group({"a": {"x": 0.1}}, {"a": {"x": (0.0, 0.2)}})):
        assert "currentColor" in figure and not re.search(r"#000000|#0a0b0d", figure)


def test_a_page_is_the_same_every_time(tmp_path, logits):
    blocks = lambda: [reliability_diagram({"a": logits[0]}, logits[1]), bars_by_group({"a": {"x": 0.1}})]  # noqa: E731
    pages = []
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, "t", "l", [Section("s", "", blocks())])
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_the_box_is_drawn_where_it_is(tmp_path):
    """On a gray image of 512x256, shown at half its size, the light line runs along the halved box."""
    import base64
    import io

    Image.new("RGB", (512, 256), (90, 90, 90)).save(tmp_path / "i.png")
    page = page_of(tmp_path, gallery([Picture(tmp_path / "i.png", "a", (100, 40, 300, 200))]))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(page.images[0].split(",")[1])))).astype(int)
    assert shown.shape == (128, 256, 3)
    yellow = (shown[..., 0] - shown[..., 2]) > 60
    rows, columns = np.nonzero(yellow.sum(1) > 60)[0], np.nonzero(yellow.sum(0) > 40)[0]
    assert abs(rows.min() - 20) <= 1 and abs(rows.max() - 99) <= 1
    assert abs(columns.min() - 50) <= 1 and abs(columns.max() - 149) <= 1


def test_a_gallery_is_limited_and_survives_lost_images(tmp_path):
    image = Image.new("RGB", (8, 8))
    page = page_of(tmp_path, gallery([Picture(image, f"card {i}") for i in range(30)], limit=5))
    assert len(page.images) == 5 and "card 4" in page.words and "card 5" not in page.words
    (tmp_path / "bad.jpg").write_bytes(b"PK")
    page = page_of(tmp_path, gallery([Picture(tmp_path / "bad.jpg", "words stay"), Picture(tmp_path / "gone.jpg", "")]))
    assert not page.images and "words stay" in page.words and "bad.jpg: is a ZIP archive" in page.words


def test_bars_show_every_group_or_say_which(tmp_path):
    spans = {"full": {"day": (0.2, 0.3), "night": (0.7, 0.8)}}
    few = page_of(tmp_path, bars_by_group({"full": {"day": 0.25, "night": 0.75}}, spans))
    assert "25" in few.words and "75" in few.words and few.words.index("day") < few.words.index("night")
    page_of(tmp_path, bars_by_group({"fg": {f"g{i:03d}": i / 100 for i in range(100)}}))
    text = (tmp_path / "r.html").read_text()
    assert "the 40 worst of 100" in text and "g039" in text and "g040" not in text


def test_the_confusion_table_counts_what_scikit_learn_counts(tmp_path, logits):
    from sklearn.metrics import confusion_matrix as reference

    z, labels = logits
    assert confusion_matrix(z.argmax(-1), labels, 3).tolist() == reference(labels, z.argmax(-1), labels=range(3)).tolist()
    names = ["a", "b", "never", "c"]
    spread = torch.cat([z[:, :2], torch.full((60, 1), -99.0), z[:, 2:]], 1)
    page = page_of(tmp_path, confusion(spread, labels + (labels == 2), names))
    assert "never" not in page.words
    many = page_of(tmp_path, confusion(torch.eye(50), torch.arange(50), [str(i) for i in range(50)]))
    assert "predicted class (index)" in many.words and any(a.startswith("data:image/png") for a in many.addresses)


def test_numbers_in_cells():
    assert str(percent(0.1234)) == "12.3" and str(percent(None)) == ""
    assert str(percent(0.5, (0.4, 0.6))) == "50.0<small>40.0–60.0</small>"
    assert str(percent(-0.05, (-0.1, 0.6))) == "−5.0<small>−10.0 to 60.0</small>"


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(L2R2Error, match=r"r\.html: cannot be written"):
        write_page(tmp_path / "file" / "r.html", "t", "l", [])

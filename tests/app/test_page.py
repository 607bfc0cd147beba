"""The page in a real browser: photo, box, prediction, saliency, background, and sentences about what is wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from app_cases import BOXES, photo, write_backgrounds
from audit_cases import GROUNDS, OBJECTS, write_data
from conftest import sentence
from explain_cases import write_spots
from fastapi.testclient import TestClient
from PIL import Image

from l2r2_models import Explainer
from l2r2_models.app.page import create_app
from l2r2_models.app.studio import Studio
from l2r2_models.audit.audit import run_audit
from l2r2_models.fusion import MetadataPrior
from l2r2_models.fusion.prior_file import write_prior

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAPTOP, PHONE = dict(width=1200, height=900), dict(width=400, height=800)
TESTS = Path(__file__).parent.parent
PROGRAM = "import sys, explain_cases, l2r2_cli; sys.argv[0] = 'l2r2'; l2r2_cli.main()"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    photo().save(folder / "photo.png")
    Image.new("RGB", (90, 90), GROUNDS["red"]).save(folder / "second.png")
    (folder / "text.png").write_text("hello")
    (folder / "temporary").mkdir()
    write_backgrounds(folder / "grounds")
    for i in range(20):  # more than fit on a phone
        Image.new("RGB", (40, 30)).save(folder / "grounds" / f"z{i}.png")
    write_spots(folder / "run")
    write_data(folder / "data")
    return folder


@contextmanager
def running(case, *options, run="run"):
    """`l2r2 app` as a process: the process and the address of its page."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "app", str(case / run), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": str(case / "temporary"), "no_proxy": "*"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[1]
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser():
    """A page of a headless Chromium, with what its console and its network say."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport=LAPTOP)
        page.set_default_timeout(60_000)
        page.problems, page.hosts = [], set()
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", lambda request: page.hosts.add(urlsplit(request.url).hostname))
        yield page
        chromium.close()


def drag(page, box):
    """Draw a box in pixels of the photo with the mouse."""
    picture = page.locator("#stage .picture")
    picture.scroll_into_view_if_needed()
    area = picture.bounding_box()
    scale = area["width"] / photo().width
    corners = [(area["x"] + scale * x, area["y"] + scale * y) for x, y in (box[:2], box[2:])]
    page.mouse.move(*corners[0])
    page.mouse.down()
    page.mouse.move(*corners[1], steps=4)
    page.mouse.up()


def wait_for(page, place, branch, label):
    """Wait until an output predicts a class."""
    page.wait_for_selector(f'{place} .answer.{branch}[data-label="{label}"]')


def test_a_visit(case):
    with browser() as page, running(case, "--backgrounds", str(case / "grounds")) as (process, url):
        page.goto(url)
        page.wait_for_selector("#stage .hint")
        assert not page.locator("#whole, #box, #second").count()  # nothing can be done without a photo
        page.locator("#photo input[type=file]").set_input_files(case / "photo.png")
        wait_for(page, "#answers", "full", "green")
        assert page.locator("#answers .answer.fg").count() == 0 and "no box was given" in page.inner_text("#answers .reason")

        drag(page, BOXES["red"])
        wait_for(page, "#answers", "fg", "red")
        drag(page, BOXES["blue"])
        wait_for(page, "#answers", "fg", "blue")
        numbers = [float(v) for v in page.locator("#box textarea, #box input").input_value().split(",")]
        assert numbers == pytest.approx(BOXES["blue"], abs=2)

        page.locator("#saliency input").check()
        page.wait_for_selector("#maps figure")
        assert page.locator("#maps figure").count() == 5
        page.locator("#saliency input").uncheck()
        page.wait_for_selector("#maps figure", state="detached")

        page.locator("#picker button").first.click()
        wait_for(page, "#elsewhere", "full", "blue")
        wait_for(page, "#elsewhere", "fg", "blue")
        assert "Whole image: blue instead of green" in page.inner_text("#elsewhere .changes")
        page.locator("#second input[type=file]").set_input_files(case / "second.png")
        wait_for(page, "#elsewhere", "full", "red")
        for size in (LAPTOP, PHONE):
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.locator("#back").click()
        page.wait_for_selector("#elsewhere .answer", state="detached")

        field = page.locator("#box textarea, #box input")
        field.fill("1, 2, 3")
        field.press("Enter")
        page.wait_for_selector("#notice >> text=A box is four numbers")
        assert page.locator("#notice .notice").evaluate("e => e.getBoundingClientRect().bottom <= window.innerHeight")
        page.locator("#photo input[type=file]").set_input_files(case / "text.png")
        page.wait_for_selector("#notice >> text=text.png: is not an image in a supported format.")
        wait_for(page, "#answers", "fg", "blue")  # the photo stays
        field.fill("20, 30, 80, 90")
        field.press("Enter")
        wait_for(page, "#answers", "fg", "red")
        page.wait_for_selector("#notice .notice", state="detached")

        assert not page.problems and "Traceback" not in page.content()
        assert page.hosts <= {"127.0.0.1", None}  # None: data and blob addresses
        assert not list((case / "temporary").rglob("*.png"))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and error == "\nstopped\n"
        assert not list((case / "temporary").glob("l2r2-app-*"))


def paint(page, box, tool):
    """Drag the brush through the middle of a box in pixels of the photo."""
    page.locator("#tool").get_by_label(tool).check()
    drag(page, (box[0], (box[1] + box[3]) / 2, box[2], (box[1] + box[3]) / 2))


def test_the_mask_is_edited(case):
    write_spots(case / "masked", fg_mode="masked_crop", margin=0.0)
    prior = MetadataPrior.of_rows(tuple(OBJECTS), ["red", "blue", "blue"] * 50, [{"site": s} for s in "abc"] * 50, ["site"])
    write_prior(case / "prior.json", prior, {})
    (case / "fence.csv").write_text("class,region\ngreen,Tatra\nred,Alps\n")
    (case / "groups.csv").write_text("class,group\nred,warm\nblue,cold\ngreen,cold\n")
    rules = ["--classes", "red,blue,green", "--geofence", case / "fence.csv", "--region", "Alps"]
    rules += ["--taxonomy", case / "groups.csv", "--rollup", "0.01", "--prior", case / "prior.json"]
    with browser() as page, running(case, *map(str, rules), run="masked") as (_, url):
        page.goto(url)
        page.locator("#photo input[type=file]").set_input_files(case / "photo.png")
        page.wait_for_selector("#stage .picture")
        assert "2 of 3 classes are possible: red, blue" in page.inner_text("body")
        page.locator("#brush input[type=number]").fill("30")
        paint(page, BOXES["blue"], "erase")
        page.wait_for_selector("#notice >> text=There is nothing to erase")
        paint(page, BOXES["blue"], "paint")  # without a box
        wait_for(page, "#answers", "fg", "blue")
        assert page.locator("#stage img.mask").count() == 1 and not page.locator("#stage svg.stroke").count()

        page.locator("#tool").get_by_label("draw a box").check()
        drag(page, BOXES["red"])
        wait_for(page, "#answers", "fg", "red")
        paint(page, BOXES["blue"], "paint")
        paint(page, BOXES["red"], "erase")  # while the page may still compute
        wait_for(page, "#answers", "fg", "blue")
        page.locator("#reset").click()
        wait_for(page, "#answers", "fg", "red")
        page.locator(".metadata input").click()
        computed = []
        page.on("request", lambda request: computed.append(request.url) if request.url.endswith("/queue/join?") else None)
        page.get_by_role("option", name="b", exact=True).click()
        page.wait_for_selector("#answers .reason >> text=site b")
        page.locator("#answers").click()  # the list loses the focus
        page.locator(".metadata input").fill("a")  # by the keyboard
        page.locator(".metadata input").press("Enter")
        page.wait_for_selector("#answers .reason >> text=site a")
        page.locator("#answers").click()
        page.wait_for_timeout(500)
        assert len(computed) == 2 and "green" not in page.inner_text("#answers")
        for size in (LAPTOP, PHONE):
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        paint(page, BOXES["blue"], "paint")  # the page may have been laid out anew
        paint(page, BOXES["red"], "erase")
        wait_for(page, "#answers", "fg", "blue")
        assert not page.problems and "Traceback" not in page.content()


def test_an_audit(case):
    with browser() as page, running(case, "--audit", str(case / "data")) as (_, url):
        page.goto(url)
        page.get_by_role("tab", name="Audit of a folder").click()
        page.get_by_label("20", exact=True).check()
        page.locator("#run").click()
        page.wait_for_selector("#audit .verdict")
        run = run_audit(case / "run", case / "data", split="test", limit=20)
        assert page.inner_text("#audit .verdict") == run.result.verdict
        for size in (LAPTOP, PHONE):
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        with page.expect_download() as download:
            page.locator("#report").click()
        assert run.result.verdict in download.value.path().read_text()
        assert not page.problems and page.hosts <= {"127.0.0.1", None}


def test_what_the_page_loads_and_offers(case, tmp_path):
    studio = Studio(Explainer.from_pretrained(case / "run", numbers=False))
    with TestClient(create_app(studio, tmp_path, megabytes=1)) as client:
        page = client.get("/").text
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="([^"]+)"', page)
        assert loaded and not [address for address in loaded if address.startswith(("http", "//"))]
        assert "fonts.googleapis" not in page and "gradio.s3" not in page
        assert client.get("/docs").status_code == 404
        assert client.get("/gradio_api/info").json()["named_endpoints"] == {}
        too_large = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * (2**20 + 1))})
        assert too_large.status_code == 413
        assert client.get(f"/gradio_api/file={case / 'run' / 'config.json'}").status_code in (403, 404)


def test_a_request_cannot_name_a_file_that_was_not_uploaded(case, tmp_path, monkeypatch):
    monkeypatch.chdir(case)
    (tmp_path / "uploads").mkdir()
    studio = Studio(Explainer.from_pretrained(case / "run", numbers=False))
    with TestClient(create_app(studio, tmp_path / "uploads")) as client:

        def shown(path):
            file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            visit = {"fn_index": 0, "data": [None, False, file], "session_hash": "visit"}
            assert client.post("/gradio_api/queue/join", json=visit).status_code == 200
            return "data:image" in client.get("/gradio_api/queue/data?session_hash=visit").text

        with open("photo.png", "rb") as image:
            (uploaded,) = client.post("/gradio_api/upload", files={"files": ("a.png", image)}).json()
        around = Path(uploaded).parent / os.path.relpath("photo.png", Path(uploaded).parent)
        for path in ("photo.png", case / "photo.png", around):
            assert not shown(path)
        assert shown(uploaded) and (case / "photo.png").exists()


def test_a_missing_package_is_one_sentence(case, monkeypatch, l2r2):
    monkeypatch.setattr("l2r2_models.serve.server.find_spec", lambda name: None if name == "gradio" else object())
    assert 'pip install "l2r2-models[app]"' in sentence(l2r2("app", case / "run"))


def test_a_folder_without_images_is_one_sentence(case, tmp_path, l2r2):
    assert "no image in this folder" in sentence(l2r2("app", case / "run", "--port", 0, "--backgrounds", tmp_path))


def test_boxes_without_a_data_set_are_misuse(case, l2r2):
    result = l2r2("app", case / "run", "--boxes", "boxes.json")
    assert result.returncode == 2 and "add --audit DATA" in result.stderr

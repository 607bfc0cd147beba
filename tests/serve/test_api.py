"""The HTTP interface in this process: predictions as from Python, bad images, limits, and what the other pages say."""

import asyncio
import io
import json
import struct
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from l2r2_models import Predictor
from l2r2_models.errors import L2R2Error
from l2r2_models.serve.api import create_app
from l2r2_models.serve.limits import Limits

BOX = [10, 5, 30, 25]


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.from_pretrained(run, batch_size=8, max_objects=3, top=2)


@pytest.fixture(scope="module")
def client(predictor):
    with TestClient(create_app(predictor, Limits(images=6))) as client:
        yield client


def png(seed=0, size=(40, 60)):
    """The bytes of a small image of noise."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(data, "png")
    return data.getvalue()


def post(client, images, boxes=()):
    """Send images (name, bytes) with their fields of boxes."""
    files = [("image", image) for image in images]
    return client.post("/predict", files=files, data={"boxes": [b if isinstance(b, str) else json.dumps(b) for b in boxes]})


def refusal(response, status):
    """The sentence of a refused request."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def same(found, expected):
    """Whether two records of an image agree; rounding may differ in the last digit."""
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=2e-5)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], v) for k, v in expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_an_answer_is_a_prediction_file_with_the_predictions_of_python(client, predictor, l2r2, run, tmp_path):
    images = {f"{i}.png": png(i, size) for i, size in enumerate([(40, 60), (90, 30), (40, 60)])}
    answer = post(client, images.items(), [[BOX, [0, 0, 9, 9]], None, {"boxes": [BOX], "scores": [0.9]}]).json()
    assert [record["file"] for record in answer["images"]] == list(images)
    first, second, third = (predictor(data, boxes) for data, boxes in zip(images.values(), [[BOX, [0, 0, 9, 9]], None, [BOX]]))
    assert same(answer["images"][0]["objects"], first.to_dict()["objects"]) and len(first.objects) == 2
    assert same(answer["images"][1]["objects"], second.to_dict()["objects"]) and second.objects[0].source == "full"
    assert same(answer["images"][2]["objects"], [{**third.to_dict()["objects"][0], "box_score": 0.9}])
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    out = tmp_path / "predictions.json"
    l2r2("predict", run, tmp_path / "1.png", "-o", out, "--max-objects", 3, "--top", 2)
    file = json.loads(out.read_text())
    assert {**file, "images": []} == {**answer, "images": []}
    assert file["images"][0].keys() - answer["images"][1].keys() == {"digest"}


def bad_images():
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = png()[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]
    return {
        "empty.png": (b"", "empty"),
        "text.png": (b"<html>", "not an image"),
        "cut.png": (png()[:500], "damaged"),
        "bomb.png": (bomb, "than the limit"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "large.png": (png(size=(80, 80)), "more than the limit of 5,000"),
        "\x1b[2J.png": (b"x", "not an image"),
    }


def test_bad_images_are_failures_of_their_own(predictor):
    bad = bad_images()
    with TestClient(create_app(predictor, Limits(pixels=5_000))) as client:
        answer = post(client, [("good.png", png()), *((name, data) for name, (data, _) in bad.items())])
        counters = client.get("/metrics").text
    assert answer.status_code == 200
    good, *others = answer.json()["images"]
    assert same(good["objects"], predictor(png()).to_dict()["objects"])
    for record, (name, (_, words)) in zip(others, bad.items()):
        assert record.keys() == {"file", "failure"} and words in record["failure"], record
        assert name == "\x1b[2J.png" or record["failure"].startswith(f"{name}: ")
    assert 'l2r2_images_total{outcome="predicted"} 1' in counters and f'{{outcome="failed"}} {len(bad)}' in counters
    assert 'l2r2_requests_total{status="200"} 1' in counters and "l2r2_waiting_images 0" in counters


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ("[[1, 2, 3]]", "unexpected form"),
        ("[1, 2, 3, 4]", "unexpected form"),
        ('[["a", 0, 1, 1]]', "unexpected form"),
        ("[[NaN, 0, 1, 1]]", "unexpected form"),
        (f"[[1{'0' * 400}, 0, 1, 1]]", "unexpected form"),
        ("7", "unexpected form"),
        ("{}", "unexpected form"),
        ('{"boxes": [[0, 0, 9, 9]], "scores": []}', "not one number per box"),
        ('{"boxes": [[0, 0, 9, 9]], "scores": [true]}', "not one number per box"),
        ("[" * 100_000, "not JSON"),
        ("1" * 10_000, "not JSON"),
        ("nonsense", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_malformed_boxes_are_refused_in_one_sentence(client, boxes, words):
    assert words in refusal(post(client, [("a.png", png())], [boxes]), 422)


def test_unusable_boxes_are_explained_as_everywhere(client):
    answer = post(client, [("a.png", png())], [[[500, 500, 600, 600], [9, 9, 9, 9]]]).json()
    assert answer["images"][0]["objects"][0]["reason"] == (
        "every box is empty or outside of the image; classified from the whole image"
    )


def test_requests_that_are_no_form_of_images(client):
    assert "not a form" in refusal(client.post("/predict", content=png(), headers={"content-type": "image/png"}), 415)
    assert "not a form" in refusal(client.post("/predict"), 415)
    assert "no image file" in refusal(client.post("/predict", files={"image": (None, "text")}), 422)
    assert "no image file" in refusal(client.post("/predict", files={"boxes": (None, "null")}), 422)
    assert 'Unknown field "img"' in refusal(client.post("/predict", files={"img": ("a.png", png())}), 422)
    assert "2 fields of boxes for 1 images" in refusal(post(client, [("a.png", png())], [None, None]), 422)
    broken = {"content-type": "multipart/form-data"}
    assert "cannot be read" in refusal(client.post("/predict", content=b"--x", headers=broken), 422)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert "cannot be read" in refusal(client.post("/predict", content=b"nonsense", headers=broken), 422)


def test_the_limits_of_a_request(predictor):
    with TestClient(create_app(predictor, Limits(megabytes=1, images=2, boxes=3))) as client:
        assert post(client, [("a.png", png())] * 2, [[BOX], [BOX, BOX]]).status_code == 200
        assert "More than 2 images or fields of boxes" in refusal(post(client, [("a.png", png())] * 3), 422)
        assert "4 boxes, more than the limit of 3" in refusal(post(client, [("a.png", png())] * 2, [[BOX] * 2] * 2), 422)
        big = [("a.png", b"x" * 2**20)]
        assert "larger than the limit of 1 MB" in refusal(post(client, big), 413)
        chunks = (b"x" * 2**16 for _ in range(20))  # without a declared length
        form = {"content-type": "multipart/form-data; boundary=x"}
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        streamed = client.post("/predict", content=(part for parts in ((start,), chunks) for part in parts), headers=form)
        assert "larger than the limit of 1 MB" in refusal(streamed, 413)
        assert post(client, [("a.png", png())]).status_code == 200


@pytest.mark.parametrize("wrong", [dict(megabytes=0), dict(pixels=-1), dict(seconds=0), dict(images=9, queue=8)])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(L2R2Error):
        Limits(**wrong)


def test_a_full_queue_refuses_and_has_room_again(predictor, monkeypatch):
    inside, go_on = threading.Semaphore(0), threading.Event()
    classify = predictor.predict_items

    def slow(items):
        inside.release()
        go_on.wait(30)
        return classify(items)

    monkeypatch.setattr(predictor, "predict_items", slow)
    with TestClient(create_app(predictor, Limits(images=2, queue=3))) as client, ThreadPoolExecutor() as others:
        first = others.submit(post, client, [("a.png", png())] * 2)
        assert inside.acquire(timeout=30)
        response = post(client, [("a.png", png())] * 2)
        assert "queue of 3 images is full" in refusal(response, 429) and response.headers["retry-after"] == "1"
        assert client.get("/health").json()["waiting"] == 2
        go_on.set()
        assert first.result().status_code == 200
        assert post(client, [("a.png", png())] * 2).status_code == 200
        assert client.get("/health").json()["waiting"] == 0


def test_concurrent_requests_share_batches_and_get_their_own_answers(predictor):
    images = [png(i, (30 + i, 50)) for i in range(12)]
    boxes = [[[i, i, i + 15, i + 15]] if i % 3 else None for i in range(12)]
    alone = [predictor(image, box).to_dict()["objects"] for image, box in zip(images, boxes)]
    with TestClient(create_app(predictor, wait=0.3)) as client, ThreadPoolExecutor(12) as clients:

        def ask(i):
            second = (i + 5) % 12
            pair = [(f"{i}.png", images[i]), (f"{second}.png", images[second])]
            return post(client, pair, [boxes[i], boxes[second]]).json()["images"]

        answers = list(clients.map(ask, range(12)))
        counters = client.get("/metrics").text
    for i, (own, other) in enumerate(answers):
        assert own["file"] == f"{i}.png" and same(own["objects"], alone[i])
        assert other["file"] == f"{(i + 5) % 12}.png" and same(other["objects"], alone[(i + 5) % 12])
    (batches,) = (float(line.split()[1]) for line in counters.splitlines() if line.startswith("l2r2_batches_total "))
    assert 3 <= batches < 12  # 24 images in batches of at most 8


def test_a_batch_that_fails_is_tried_image_by_image(predictor, monkeypatch):
    classify = predictor.predict_items

    def fragile(items):
        if len(items) > 1 or items[0].name == "bad.png":
            raise RuntimeError("out of\nmemory")
        return classify(items)

    monkeypatch.setattr(predictor, "predict_items", fragile)
    with TestClient(create_app(predictor)) as client:
        good, bad = post(client, [("good.png", png()), ("bad.png", png())]).json()["images"]
    assert good["objects"] and bad["failure"] == "bad.png: cannot be classified (out of memory)."


def test_a_bug_fails_its_request_and_the_server_goes_on(predictor, monkeypatch):
    def broken(items):
        raise KeyError("secret")

    with TestClient(create_app(predictor), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patched:
            patched.setattr(predictor, "predict_items", broken)
            said = refusal(post(client, [("a.png", png())]), 500)
        assert "secret" not in said
        assert post(client, [("a.png", png())]).status_code == 200
        assert 'l2r2_requests_total{status="500"} 1' in client.get("/metrics").text


def test_no_upload_touches_the_disk(predictor, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refuse)
    with TestClient(create_app(predictor)) as client:
        assert post(client, [("a.png", png(size=(1000, 1000)))]).status_code == 200  # 3 MB


def test_a_localizer_finds_the_boxes_of_images_without_any(run):
    with TestClient(create_app(Predictor.from_pretrained(run, localizer="center?share=0.4"))) as client:
        found, given = post(client, [("a.png", png())] * 2, [None, [BOX]]).json()["images"]
        assert found["objects"][0]["box"] == [18, 12, 42, 28] and given["objects"][0]["box"] == BOX
        assert "the localizer center?share=0.4 finds" in client.get("/").text


def test_the_other_addresses(client):
    page = client.get("/").text
    assert "curl -F image=@photo.jpg http://testserver/predict" in page and "classified as a whole" in page
    assert "3 classes, full and fg" in page and "6 images" in page
    assert client.get("/health").json()["status"] == "ok"
    body = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(body["multipart/form-data"]["schema"]["properties"]) == {"image", "boxes"}
    assert "no such address" in refusal(client.get("/docs"), 404)
    assert "does not accept GET" in refusal(client.get("/predict"), 405)


def test_metrics_are_in_the_text_format_of_prometheus(client):
    post(client, [("a.png", png())])
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = []
    for line in response.text.splitlines():
        if line.startswith("# TYPE"):
            names.append(line.split()[2])
            assert line.split()[3] == ("counter" if names[-1].endswith("_total") else "gauge")
        elif not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name.split("{")[0] == names[-1] and float(value) >= 0
    assert len(names) == len(set(names)) == 5


def test_a_slow_upload_is_given_up(predictor):
    app = create_app(predictor, Limits(seconds=0.05))
    sent = []

    async def receive():
        await asyncio.sleep(10)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    scope = dict(type="http", method="POST", path="/predict", query_string=b"", headers=headers, http_version="1.1")
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    assert sent[0]["status"] == 408 and b"longer than 0.05 seconds" in sent[1]["body"]

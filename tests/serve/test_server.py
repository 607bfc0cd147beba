"""The command `l2r2 serve` as a process on the loopback interface, asked by clients at the same time."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import sentence
from test_api import BOX, png, same
from typer.main import get_command

from l2r2_cli.commands import app
from l2r2_models import Predictor
from l2r2_models.predict.rule_files import read_rules
from l2r2_models.serve import server as server_module
from l2r2_models.serve.server import listen

ROOT = Path(__file__).parent.parent.parent


def form(images, boxes=()):
    """The body of a form and its headers."""
    body = io.BytesIO()
    parts = [(f'name="image"; filename="{name}"', data) for name, data in images]
    parts += [('name="boxes"', json.dumps(box).encode()) for box in boxes]
    for about, data in parts:
        body.write(b"--frontier\r\nContent-Disposition: form-data; " + about.encode() + b"\r\n\r\n" + data + b"\r\n")
    body.write(b"--frontier--\r\n")
    return body.getvalue(), {"Content-Type": "multipart/form-data; boundary=frontier"}


def ask(url, images, boxes=()):
    """Status and JSON of a request."""
    body, headers = form(images, boxes)
    try:
        with urllib.request.urlopen(urllib.request.Request(url + "predict", body, headers), timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """Options that restrict and roll up the classes."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "fence.csv").write_text("class,region\nred,Alps\ngreen,Tatra\n")
    (folder / "groups.csv").write_text("class,group,broader\nred,warm,color\nblue,cold,color\ngreen,cold,color\n")
    return dict(geofence=folder / "fence.csv", region="Alps", taxonomy=folder / "groups.csv", rollup=0.55, classes="red,blue")


@pytest.fixture(scope="module")
def server(run, rules, tmp_path_factory):
    """A server in an empty folder: its process and its URL."""
    folder = tmp_path_factory.mktemp("serve")
    program = "import sys, l2r2_cli; sys.argv[0] = 'l2r2'; l2r2_cli.main()"
    options = ["--port", "0", "--max-images", "3", "--max-pixels", "10000", "--max-boxes", "4", "--max-mb", "1", "--top", "2"]
    options += [word for name, value in rules.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", str(run), *options, "--max-queue", "40", "--wait", "20", "--max-objects", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)},
    )
    line = process.stdout.readline()
    assert " on http://127.0.0.1:" in line, process.stderr.read()
    yield process, line.split(" on ")[1].split()[0]
    process.kill()
    process.wait()


def test_clients_at_the_same_time_get_what_python_says(server, run, rules):
    _, url = server
    predictor = Predictor.from_pretrained(run, top=2, max_objects=2)
    predictor = predictor.with_rules(read_rules(predictor.labels, **rules))
    images, boxes = [png(i, (30 + i, 50)) for i in range(10)], [[[i, i, i + 15, i + 15], BOX, BOX] for i in range(10)]
    expected = [predictor(image, box).to_dict() for image, box in zip(images, boxes)]
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda i: ask(url, [(f"{i}.png", images[i])], [boxes[i]]), range(10)))
    for i, (status, answer) in enumerate(answers):
        assert status == 200 and same(answer["images"], [{**expected[i], "file": f"{i}.png"}])
        assert len(expected[i]["objects"]) == 2
    assert {o["source"] for one in expected for o in one["objects"]} == {"rollup"}
    assert not any(one["label"] == "green" for found in expected for o in found["objects"] for one in o["top"])


def test_the_limits_of_the_command_line(server):
    _, url = server
    assert ask(url, [("a.png", png())] * 4)[0] == 422
    assert ask(url, [("a.png", png())], [[BOX] * 5])[0] == 422
    status, answer = ask(url, [("a.png", b"x" * 2**23)])  # more than sockets buffer: who does not read it all loses the answer
    assert status == 413 and "1 MB" in answer["error"]
    status, answer = ask(url, [("large.png", png(size=(101, 100))), ("a.png", png())])
    assert status == 200 and "more than the limit of 10,000" in answer["images"][0]["failure"] and answer["images"][1]["objects"]


def test_a_connection_that_breaks_off_does_no_harm(server):
    _, url = server
    port = int(url.rsplit(":", 1)[1].strip("/"))
    for data in (
        b"\x16\x03\x01nonsense\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n--x",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
    with urllib.request.urlopen(url + "health", timeout=60) as response:
        assert json.load(response)["status"] == "ok"


def test_a_port_in_use_is_one_sentence(server, run, l2r2):
    _, url = server
    port = url.rsplit(":", 1)[1].strip("/")
    assert "cannot be used" in sentence(l2r2("serve", run, "--port", port))


def test_ctrl_c_ends_it_with_one_line_and_no_file_was_written(server):
    """The last test: it ends the server."""
    process, _ = server
    assert not os.listdir(f"/proc/{process.pid}/cwd")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "\nstopped\n"


def test_other_hosts():
    opened, url = listen("localhost", 0)
    with opened:
        assert url == f"http://localhost:{opened.getsockname()[1]}/"
    with pytest.raises(server_module.L2R2Error, match="choose another --host"):
        listen("no.such.host.invalid", 0)


def test_a_missing_package_is_one_sentence(monkeypatch, run, l2r2):
    monkeypatch.setattr(server_module, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert 'pip install "l2r2-models[serve]"' in sentence(l2r2("serve", run))


def test_a_risk_that_was_not_fitted_is_one_sentence(run, l2r2):
    assert "has no threshold to abstain" in sentence(l2r2("serve", run, "--port", 0, "--abstain", 0.05))


def test_a_queue_shorter_than_a_request_is_one_sentence(run, l2r2):
    assert "no room for a request of 9" in sentence(l2r2("serve", run, "--max-images", 9, "--max-queue", 8))


def test_the_dockerfile_copies_what_exists_and_runs_a_command_that_parses():
    lines = (ROOT / "examples" / "docker" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert "pyproject.toml" in copied and all((ROOT / name).exists() for name in copied)
    kept = (ROOT / "examples" / "docker" / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} == {name for name in kept if name.startswith("!")}
    entry, command = (
        json.loads(next(x for x in lines if x.startswith(word)).partition(" ")[2]) for word in ("ENTRYPOINT", "CMD")
    )
    name, *arguments = [*entry, *command][1:]
    given = get_command(app).commands[name].load().make_context(name, arguments).params
    assert given["run"] == "/model" and given["host"] == "0.0.0.0" and f"EXPOSE {given['port']}" in lines

"""Ctrl-C prints one line and exits with status 130, whatever the command is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest

LINE = "interrupted; run the same command (without --overwrite) to continue"


def interrupted(command, when, **options):
    """Start a command, send it SIGINT once `when(process)` returns, and give its exit status and its standard error."""
    # Python's own start is not ours to keep quiet
    program = "import sys, l2r2_cli; sys.argv[0] = 'l2r2'; print('ready', flush=True); l2r2_cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    when(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, error = process.communicate(timeout=120)
    return process.returncode, [line for line in error.splitlines() if line.strip()]


@pytest.mark.parametrize("delay", [0.01, 0.1, 0.5, 1.0, 2.0])
def test_at_start_up(delay, tmp_path):
    """While torch is imported too, where a KeyboardInterrupt is a traceback of a hundred lines."""
    code, lines = interrupted(["predict", tmp_path / "none", tmp_path, "-o", tmp_path / "o.json"], lambda _: time.sleep(delay))
    assert (code, lines) == (130, [LINE]) or (code == 1 and lines[0].startswith("error:"))  # it may have been done already


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_training_with_its_workers(workers, dataset, tmp_path):
    out = tmp_path / "run"

    def training(process):
        deadline = time.monotonic() + 100
        while not (out / "run.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)

    settings = ["--set", f"workers={workers}", "--set", "epochs=2000", "--set", "size=32"]
    command = ["finetune", dataset, "--model", "timm:resnet10t", "--no-pretrained", "-o", out, *settings]
    code, lines = interrupted(command, training)
    assert code == 130 and lines[-1] == LINE and not any("Traceback" in line for line in lines), lines[-5:]
    assert not list(tmp_path.glob("*.lock"))


def test_in_a_prediction_with_its_threads(run, dataset, tmp_path):
    """The same command then continues."""
    photos, out = tmp_path / "photos", tmp_path / "out.json"
    photos.mkdir()
    for i in range(6000):
        os.link(dataset / "images" / f"train_{i % 12:03}.png", photos / f"{i:05}.png")

    def predicting(process):
        deadline = time.monotonic() + 100
        while not list(out.parent.glob("out.json.parts/*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)

    code, lines = interrupted(["predict", run, photos, "-o", out, "--workers", "3"], predicting)
    assert code == 130 and lines[-1] == LINE and not any("Traceback" in line for line in lines), lines[-5:]
    for path in list(photos.iterdir())[1000:]:
        path.unlink()
    done = subprocess.run([sys.executable, "-m", "l2r2_cli", "predict", run, photos, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0 and "1000 images" in done.stdout and "from before" in done.stdout, done.stderr[-500:]


def test_when_all_is_done():
    """While Python shuts down: the result stands, and nothing is said about it."""
    start = "import atexit, os, signal, sys, l2r2_cli; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    program = f"{start}; sys.argv[:] = ['l2r2', '--help']; l2r2_cli.main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "finetune" in done.stdout and done.stderr == ""

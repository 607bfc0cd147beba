"""One writer per output: a second process gets an error that names the first, and a killed one does not block."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import sentence

from l2r2_models.errors import L2R2Error
from l2r2_models.locks import only_writer

HOLD = """
import sys, time, multiprocessing
from pathlib import Path
from l2r2_models.locks import only_writer
with only_writer(Path(sys.argv[1])):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,)).start()  # it outlives its parent
    print("held", flush=True)
    time.sleep(60)
"""


def hold(out):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    out = tmp_path / "new" / "predictions.json"
    process = hold(out)
    said = f"predictions.json is being written by process {process.pid} on host {socket.gethostname()} since 20"
    with (
        pytest.raises(L2R2Error, match=re.escape(said) + r"[-: 0-9]+; wait for it to finish, or choose another output\.$"),
        only_writer(out),
    ):
        pass
    with only_writer(tmp_path / "new" / "other.json"):  # another output is another lock
        pass
    out.with_name("predictions.json.lock").write_text("process 7 on host elsewhere since 2026-01-01 00:00:00")
    gone = r"on host elsewhere since .* If that host is gone for good, remove .*predictions\.json\.lock"
    with pytest.raises(L2R2Error, match=gone), only_writer(out):
        pass
    process.kill()
    process.wait()


def test_the_lock_of_a_killed_process_is_taken_over_and_its_temporary_files_go(tmp_path):
    out = tmp_path / "boxes.json"
    process = hold(out)
    (tmp_path / ".boxes.json.ab12_x9z.tmp").write_text("half")  # as a kill while it writes leaves it
    (tmp_path / ".boxes.json.20261124").write_text("a backup")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with only_writer(out):
        assert str(os.getpid()) in (tmp_path / "boxes.json.lock").read_text()
    assert [file.name for file in tmp_path.iterdir()] == [".boxes.json.20261124"]


def test_of_many_writers_one_at_a_time_writes(tmp_path):
    inside, most = [], []

    def writer(_):
        for _ in range(50):
            try:
                with only_writer(tmp_path / "out"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0)
                    inside.pop()
            except L2R2Error:
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(writer, range(4)))
    assert set(most) == {1} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["predict", "localize", "finetune"])
def test_the_commands_leave_an_output_alone_that_another_writes(l2r2, tmp_path, dataset, run, command):
    out = tmp_path / ("run" if command == "finetune" else "out.json")
    arguments = {
        "predict": [run, dataset, "-o", out],
        "localize": [dataset, "--localizer", "full", "-o", out],
        "finetune": [dataset, "--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 1, "-o", out],
    }
    with only_writer(out):
        said = sentence(l2r2(command, *arguments[command]))
    assert f"{out} is being written by process {os.getpid()} on host" in said
    assert not out.exists()


def test_a_folder_beside_which_nothing_can_be_written_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("l2r2_models.locks.os.open", refuse)
    with only_writer(tmp_path / "volume"):
        assert "volume: cannot be locked (Permission denied); make sure that no other process writes to it" in caplog.text
    refused = pytest.raises(L2R2Error, match=r"boxes\.json: cannot be written \(Permission denied\)")
    with refused, only_writer(tmp_path / "boxes.json"):
        pass


def test_the_current_folder_can_be_locked(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with only_writer(Path(".")):
        assert (tmp_path / "run.lock").exists()

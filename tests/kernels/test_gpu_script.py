"""`benchmarks/speed/gpu.py`: a step that fails does not end the others, logs are kept, the goal table is shown last."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("speed_on_a_gpu", ROOT / "benchmarks" / "speed" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def test_every_step_names_files_that_exist(script):
    named = [Path(word) for step in script.STEPS.values() for word in step if word.endswith(".py") or word.startswith("tests/")]
    assert len(named) >= 8 and all((ROOT / path).exists() for path in named)


def test_a_failing_step_does_not_end_the_others(script, monkeypatch, capfd):
    table = "print('noise'); print('op  case  ms'); print('roi_views  ragged  0.2  held')"
    dying = "import os; print('dies', flush=True); os.abort()"
    steps = {"tests": ["-c", dying], "kernels": ["-c", table], "cpu": ["-c", "1 / 0"]}
    monkeypatch.setattr(script, "STEPS", steps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.main([]) == 1
    shown = capfd.readouterr().out
    assert "dies" in shown and "ZeroDivisionError" in shown
    results = shown.partition("=== results\n")[2].splitlines()
    assert [line.split()[0] for line in results[:3]] == ["tests", "kernels", "cpu"]
    assert "exit code -6" in results[0] and " ok " in results[1] and "exit code 1" in results[2]
    assert results[4:] == ["op  case  ms", "roi_views  ragged  0.2  held"]
    assert (script.LOGS / "tests.txt").read_text() == "dies\n"
    assert script.main(["--only", "kernels"]) == 0


def test_a_step_whose_tests_are_all_skipped_failed(script, monkeypatch, capfd, tmp_path):
    skipped, passed = tmp_path / "test_skipped.py", tmp_path / "test_passed.py"
    skipped.write_text("import pytest\n\ndef test_it():\n    pytest.skip('1 passed')\n")
    passed.write_text(f"{skipped.read_text()}\ndef test_that():\n    pass\n")
    options = [*script.PYTEST, "-rs"]
    monkeypatch.setattr(script, "STEPS", {"tests": [*options, str(skipped)], "cpu": [*options, str(passed)]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.main([]) == 1
    results = capfd.readouterr().out.partition("=== results\n")[2].splitlines()
    assert "no test passed" in results[0] and " ok " in results[1]
    assert script.main(["--only", "cpu"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_it_says_so_and_writes_nothing(script, capsys):
    assert script.main([]) == 1 and "nothing was run" in capsys.readouterr().out
    assert not script.LOGS.exists()

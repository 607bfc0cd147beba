"""Run every GPU check and benchmark: `python benchmarks/speed/gpu.py`.

Runs one step after the other, each in a process of its own, so that one that fails (or breaks the CUDA context) does not end the
others: the GPU tests, which compile every kernel they run; the launch tables compiled for sm_90; the kernels and training steps
against their peers (`kernels.py`); a whole ViT on packed tokens; from files to predictions; and the CPU path of `roi_views`. Each
step's output is shown, and kept in benchmarks/results/gpu_logs/; the scripts write their own CSV with device, versions and date.
At the end, each step is listed with its result and time, and the goal table of `kernels.py` is printed again. The exit code is 1
if a step failed; tests that were all skipped are a failure. `--only NAME` runs single steps, `--list` shows them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEED, LOGS = ROOT / "benchmarks" / "speed", ROOT / "benchmarks" / "results" / "gpu_logs"
PYTEST = ["-m", "pytest", "-q", "-p", "no:xdist", "--timeout", "3600"]
GPU_TESTS = ["tests/kernels", "tests/models/test_packed_graphs.py", "tests/train/test_graphs_in_training.py"]
STEPS: dict[str, list[str]] = {
    "tests": [*PYTEST, "-m", "gpu", *GPU_TESTS],
    "sm90": [*PYTEST, "-m", "interpreter", "tests/kernels/test_kernels_sm90.py"],
    "kernels": [str(SPEED / "kernels.py")],
    "packed_vit": [str(SPEED / "packed_vit.py"), "--model", "vit_base_patch16_224", "--batch", "32"],
    "endtoend_resnet50": [str(SPEED / "endtoend.py"), "--images", "512", "--no-onnx"],
    "endtoend_vit": [str(SPEED / "endtoend.py"), "--backbone", "vit_base_patch16_224", "--images", "512", "--no-onnx"],
    "cpu": [*PYTEST, str(SPEED / "test_cpu_roi_views.py")],
}


def run(name: str, arguments: list[str]) -> tuple[str, float]:
    """Run a step, show and keep what it prints; return "ok" or what went wrong, and the seconds that it took."""
    began, line = time.monotonic(), ""
    print(f"\n=== {name}: python {' '.join(arguments)}", flush=True)
    with open(LOGS / f"{name}.txt", "w") as log:
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        with subprocess.Popen([sys.executable, *arguments], **options) as step:
            for line in step.stdout:
                print(line, end="", flush=True)
                log.write(line)
    result = f"exit code {step.returncode}" if step.returncode else "ok"
    if result == "ok" and "pytest" in arguments and not re.search(r"\b[1-9]\d* passed", line):  # pytest's last line
        result = "no test passed"
    return result, time.monotonic() - began


def goal_table() -> str:
    """The goal table in the log of `kernels.py`, its last lines from the heading on."""
    lines = (LOGS / "kernels.txt").read_text().splitlines()
    headings = [number for number, line in enumerate(lines) if line.startswith("op ")]
    return "\n".join(lines[headings[-1] :]) if headings else "kernels.py made no goal table; see its log."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="NAME", help="run these steps only")
    parser.add_argument("--list", action="store_true", help="show the steps and exit")
    options = parser.parse_args(arguments)
    if options.list:
        print(*(f"{name:18} python {' '.join(step)}" for name, step in STEPS.items()), sep="\n")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device: nothing was run. `kernels.py --dry-run` tries the rows on a CPU.")
        return 1
    LOGS.mkdir(parents=True, exist_ok=True)
    chosen = options.only or list(STEPS)
    results = {name: run(name, STEPS[name]) for name in chosen}
    print("\n=== results")
    for name, (result, seconds) in results.items():
        print(f"{name:18} {result:14} {seconds:8.0f} s")
    if "kernels" in results:
        print(f"\n{goal_table()}")
    return int(any(result != "ok" for result, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())

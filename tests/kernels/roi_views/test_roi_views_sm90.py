"""Every launch the tables can choose for the usual case compiles for sm_90, without a GPU, without spills, onto tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
PARKED = 16  # bytes of stack; ptxas parks a few when it rounds registers down to the next occupancy step, a spill is more
USUAL = (
    r"forward kind=[01] masked=False ratio=(1.0|2.24) uint8=True out=\*bf16",
    r"forward kind=0 masked=(True|False) ratio=18.0 uint8=True out=\*(bf16|fp32)",
    r"forward kind=0 masked=False ratio=2.24 uint8=False out=\*bf16",
    r"backward kind=0 masked=False",
    r"prepare kind=0",
    r"pil kind=1 masked=False",
    r"pil_prepare kind=1",
)


def compile_for_hopper(*wanted):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("roi_views_compile.py")
    run = subprocess.run([sys.executable, str(program), *wanted], env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(entries):
    for entry in entries:
        assert entry["stack"] <= PARKED and entry["local"] == 0, f"spills: {entry}"
        assert "prepare" in entry["name"] or entry["tensor_core"] > 0, f"no tensor-core instructions: {entry}"


def test_the_usual_launches_compile_without_spills():
    entries = compile_for_hopper(*USUAL)
    assert len(entries) >= 12
    check(entries)


@pytest.mark.slow
def test_every_launch_compiles_without_spills():
    entries = compile_for_hopper()
    assert len(entries) >= 90
    check(entries)

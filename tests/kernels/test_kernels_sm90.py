"""All entries of the launch tables compile for sm_90, without a GPU: no spills, tensor cores used, shared memory fits.

The kernels of uint8 images read words, 32 lanes side by side along a row; lanes along a column would read uncoalesced.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.interpreter

pytest.importorskip("triton.backends.nvidia")
# The forward of long images needs all registers, and some versions of Triton one or a few more: the fastest tile on an H100.
STACK = {f"{dtype}:64:785 forward varlen=False": 16 for dtype in ("bf16", "fp16")}
SHARED = 227 * 1024  # bytes a block can have
USUAL_VIEWS = (
    r"uint8 kind=0 pixel=[13] mixed=False masked=False half=True ratio=2.24",
    r"uint8 kind=1 pixel=3 mixed=False masked=(True|False) half=True ratio=2.24",
    r"uint8 kind=0 pixel=3 mixed=False masked=False half=True ratio=18.0",
    r"uint8 kind=0 pixel=3 mixed=False masked=False half=False ratio=2.24",
    r"uint8 kind=0 pixel=1 mixed=True masked=True half=True ratio=9.0",
    r"general kind=0 masked=False images=float32",
    r"backward kind=0 masked=False",
    r"prepare kind=0",
    r"pil kind=0 pixel=3 mixed=False masked=(True|False)",
    r"pil_prepare kind=1",
)
USUAL_ATTENTION = ("bf16:64:64", "bf16:64:785", "tf32:64:64")  # ViT-B heads; short and long segments
ATTENTION = [f"{dtype}:{dim}:{length}" for dtype in ("bf16", "fp16") for dim in (32, 64, 80, 128) for length in (64, 785)]
ATTENTION += [f"{dtype}:{dim}:64" for dtype in ("fp32", "tf32") for dim in (32, 64, 80, 128)]
SLOW = (pytest.mark.slow, pytest.mark.timeout(3600))


@pytest.mark.parametrize(
    ("program", "wanted", "least"),
    [
        ("compile_roi_views.py", USUAL_VIEWS, 13),
        ("compile_masked_attention.py", USUAL_ATTENTION, 20),
        pytest.param("compile_roi_views.py", (), 140, marks=SLOW),
        pytest.param("compile_masked_attention.py", ATTENTION, 146, marks=SLOW),
    ],
    ids=["usual views", "usual attention", "all views", "all attention"],
)
def test_kernels_compile_for_hopper_without_spills(program, wanted, least):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name(program)), *wanted]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    entries = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(entries) >= least
    for entry in entries:
        assert entry["stack"] <= STACK.get(entry["name"], 0) and entry["local"] == 0, f"spills: {entry}"
        assert entry["shared"] <= SHARED, f"too much shared memory: {entry}"
        assert entry["tensor_core"] > 0 or not entry["dots"], f"no tensor-core instructions: {entry}"
        if entry["name"].startswith(("uint8 ", "pil kind")):
            assert entry["byte_loads"] == 0 and entry["lanes"] == ["[32, 1]"], f"not words along a row: {entry}"

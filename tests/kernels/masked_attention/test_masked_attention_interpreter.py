"""Runs the Triton kernels on the CPU, in a process of their own: Triton reads TRITON_INTERPRET once, when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.skipif(
    RELEASE < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="this Triton's interpreter cannot loop to a bound from memory with NumPy 2.4; install an older NumPy",
)
def test_kernels_in_the_interpreter():
    tests = Path(__file__).with_name("interpreted_masked_attention.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--confcutdir={tests.parent}", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

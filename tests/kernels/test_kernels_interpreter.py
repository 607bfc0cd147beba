"""Run the Triton kernels on the CPU, in separate processes, because Triton reads TRITON_INTERPRET once, on import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        RELEASE < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="this Triton's interpreter cannot loop to a bound from memory with NumPy 2.4; install an older NumPy",
    ),
]


@pytest.mark.parametrize(
    ("file", "tests", "least"),
    [
        ("roi_views/test_roi_views_triton.py", "words or pil or buffer or outside", 14),
        ("roi_views/test_roi_views_triton.py", "not (words or pil or buffer or outside)", 25),
        ("masked_attention/test_masked_attention_triton.py", "", 30),
    ],
)
def test_kernels_in_the_interpreter(file, tests, least):
    options = ["-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-k", tests]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least

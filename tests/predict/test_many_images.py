"""Many images, and a process that is killed again and again; a larger version is `benchmarks/speed/many_images.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed" / "many_images.py"


@pytest.mark.slow  # six processes
@pytest.mark.timeout(1800)
def test_after_five_kills_every_image_has_one_prediction_and_memory_stays_flat():
    done = subprocess.run([sys.executable, SCRIPT, "--images", "3000", "--kills", "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr  # it checks the file itself
    found = json.loads(done.stdout.splitlines()[-1])
    stored = [int(count) for count in found["stored_at_kills"].split()]
    assert len(stored) == 5 and stored == sorted(stored) and found["kept_after_last_kill"] >= stored[-1] >= 2500
    assert found["ratio"] < 1.1

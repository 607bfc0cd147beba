"""timm's own test_models.py on our models; its source distribution contains it: `make test-more`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# the smallest model of every family
SMALL = (
    "l2r2_resnet18",
    "l2r2_convnext_tiny",
    "l2r2_convnextv2_atto",
    "l2r2_vit_tiny_patch16_224",
    "l2r2_efficientnet_b0",
    "l2r2_swin_tiny_patch4_window7_224",
    "l2r2_masked_vit_small_patch16_224",
    "l2r2_masked_eva02_small_patch14_336",
    "ifam_vit_tiny_patch16_224",
    "l2r2",
)


@pytest.mark.timm_suite
@pytest.mark.timeout(1800)
def test_timms_own_tests_pass_unchanged():
    """L2R2_TIMM_CHECKOUT=folder of timm's sources; L2R2_TIMM_MODELS='l2r2_*' for all sizes. Weights are not downloaded."""
    checkout = os.environ.get("L2R2_TIMM_CHECKOUT")
    if not checkout or not (Path(checkout) / "tests" / "test_models.py").is_file():
        pytest.skip("L2R2_TIMM_CHECKOUT does not name a folder with timm's tests")
    models = os.environ.get("L2R2_TIMM_MODELS") or ",".join(SMALL)
    environment = {**os.environ, "L2R2_TIMM_MODELS": models, "PYTHONPATH": str(Path(__file__).parent)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    without = ["test_model_load_pretrained", "test_model_features_pretrained"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "timm_plugin",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "ignore",
        "-k",
        "l2r2 or ifam",
        *(f"--deselect=tests/test_models.py::{name}" for name in without),
        "tests/test_models.py",
    ]
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout

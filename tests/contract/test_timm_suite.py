"""timm's own test_models.py on our models, where a checkout of timm is at hand (it is not in the wheel)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = "l2r2_resnet18,l2r2_convnextv2_atto,l2r2_vit_tiny_patch16_224,l2r2_swin_tiny*,l2r2_efficientnet_b0,l2r2"


@pytest.mark.timeout(1800)
def test_timms_own_tests_pass_unchanged():
    """L2R2_TIMM_CHECKOUT=path/to/pytorch-image-models; L2R2_TIMM_MODELS='l2r2_*' for all sizes. Weights are not downloaded."""
    checkout = os.environ.get("L2R2_TIMM_CHECKOUT")
    if not checkout:
        pytest.skip("L2R2_TIMM_CHECKOUT does not name a checkout of timm")
    environment = {
        **os.environ,
        "L2R2_TIMM_MODELS": os.environ.get("L2R2_TIMM_MODELS", SMALL),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "timm_plugin", "-p", "no:cacheprovider", "-W", "ignore", "-k", "l2r2",
        "--deselect", "tests/test_models.py::test_model_load_pretrained",
        "--deselect", "tests/test_models.py::test_model_features_pretrained", "tests/test_models.py",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout

"""The wheel, installed into an empty folder and used from outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from l2r2_models.models.registry import ARCHITECTURES

ROOT = Path(__file__).parent.parent


def python(code, place, **environment):
    """Run code in a folder with the installed wheel first on the path."""
    variables = {**os.environ, "PYTHONPATH": str(place), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place.parent, env=variables)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    for path in subprocess.run(
        ["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / path).is_file():  # uncommitted changes are part of what is tested
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes((ROOT / path).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    place = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def test_the_wheel_holds_our_packages_and_none_called_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"l2r2_models", "l2r2_kernels", "l2r2_cli", "l2r2_hub_configs"}
    data = {"l2r2_hub_configs/derived.csv", "l2r2_models/py.typed", "l2r2_models/report/report.html"}
    data |= {f"l2r2_models/app/{name}" for name in ("style.css", "draw.js", "pick.js")}
    assert data <= set(names)
    for source in (ROOT / "l2r2_models").rglob("*.py"):
        assert source.relative_to(ROOT).as_posix() in names
    for source in (ROOT / "kernels" / "torch-ext").rglob("*.py"):
        assert source.relative_to(ROOT / "kernels" / "torch-ext").as_posix() in names


def test_the_installed_wheel_imports_lists_and_reads_its_hub_configs(installed):
    code = """
import timm, l2r2_models, l2r2_kernels
from l2r2_models.models.hub_configs import load_hub_configs
print(l2r2_models.__file__); print(l2r2_kernels.__file__)
print(len(timm.list_models("l2r2*")), len(load_hub_configs()))
print(type(timm.create_model("l2r2_convnextv2_atto")).__name__)
"""
    result = python(code, installed)
    models, kernels, counts, name = result.stdout.split("\n")[:4]
    assert models.startswith(str(installed)) and kernels.startswith(str(installed)), result.stderr
    registered = sum(name.startswith("l2r2") for name in ARCHITECTURES) + 1  # and the generic one
    assert int(counts.split()[0]) == registered and int(counts.split()[1]) > 100 and name == "L2R2"


def test_the_installed_wheel_does_not_disturb_transformers(installed, tmp_path):
    code = f"""
import importlib.util, l2r2_models, transformers
from transformers import ViTConfig, ViTModel
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8)
ViTModel(config).save_pretrained({str(tmp_path)!r})
print(type(transformers.AutoModel.from_pretrained({str(tmp_path)!r})).__name__, importlib.util.find_spec("kernels"))
"""
    result = python(code, installed)
    assert result.stdout.strip().endswith("ViTModel None"), result.stderr[-2000:]

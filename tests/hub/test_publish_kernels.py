"""`l2r2 publish-kernels`: the layout of the Kernel Hub, loaded from a folder, pushed to the branch of its version."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hub_double import TOKEN, HubDouble

from l2r2_cli.commands import main
from l2r2_models import L2R2Error
from l2r2_models.hub.publish_kernels import prepare_kernels, push_kernels

pytest.importorskip("tomllib")
KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture
def there(tmp_path, monkeypatch):
    with HubDouble().running() as double:
        double.connect(monkeypatch, tmp_path / "home", TOKEN)
        yield double


def test_a_build_for_each_backend_that_loads_under_any_name(tmp_path):
    card, builds, branch = prepare_kernels(KERNELS, tmp_path / "repo")
    assert builds.problems == () and branch == "v1" and set(card.files) == {"README.md"}
    assert {name.split("/")[1] for name in builds.files} == {"torch-cpu", "torch-cuda"}
    build = tmp_path / "repo" / "build" / "torch-cpu"
    metadata = json.loads((build / "metadata.json").read_text())
    assert metadata["name"] == "l2r2-kernels" and metadata["backend"] == {"type": "cpu"} and metadata["version"] == 1
    spec = importlib.util.spec_from_file_location("some_hash", build / "__init__.py", submodule_search_locations=[str(build)])
    module = sys.modules["some_hash"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        q = torch.randn(1, 2, 5, 8)
        kept = torch.tensor([[True, False, True, True, True]])
        import l2r2_kernels

        assert torch.equal(module.masked_attention(q, q, q, kept), l2r2_kernels.masked_attention(q, q, q, kept))
        assert hasattr(torch.ops, metadata["id"])  # a namespace of its own
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "some_hash"]:
            del sys.modules[name]


def test_push_and_push_again_leaves_no_file_of_before(there, tmp_path, monkeypatch, capsys):
    kernels = shutil.copytree(KERNELS, tmp_path / "kernels")
    (kernels / "torch-ext" / "l2r2_kernels" / "old.py").write_text("")
    push_kernels(*prepare_kernels(kernels, tmp_path / "first", "org/kernels"))
    assert there.repos["kernels/org/kernels"].files("v1")[1]["build/torch-cpu/old.py"] == b""
    monkeypatch.setattr(sys, "argv", ["l2r2", "publish-kernels", str(KERNELS), "org/kernels", "--push"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and "branch v1" in capsys.readouterr().out
    files = there.repos["kernels/org/kernels"].files("v1")[1]
    assert "build/torch-cpu/old.py" not in files and "build/torch-cuda/roi_views/triton.py" in files
    card, ours = there.repos["kernels/org/kernels"].files("main")[1]["README.md"].decode(), (KERNELS / "CARD.md").read_text()
    assert 'get_kernel("org/kernels", version=1)' in card and "l2r2/l2r2-kernels" not in card  # it names where it lies
    assert card.replace("org/kernels", "l2r2/l2r2-kernels") == ours


def test_a_dry_run_sends_nothing(there, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["l2r2", "publish-kernels", str(KERNELS), "org/kernels"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code and "nothing was uploaded" in capsys.readouterr().out and there.log == []


def test_written_to_a_folder_that_kernels_loads(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new" / "repo"

    def publish():
        monkeypatch.setattr(sys, "argv", ["l2r2", "publish-kernels", str(KERNELS), "--to", str(folder)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    assert not publish() and f"written to {folder}" in capsys.readouterr().out
    assert (folder / "README.md").is_file() and (folder / "build" / "torch-cpu" / "metadata.json").is_file()
    assert publish() == 1 and "is not empty; choose a new folder" in capsys.readouterr().err
    loader = pytest.importorskip("kernels.load", reason="needs the package `kernels`")
    module = loader.get_local_kernel(folder, backend="cpu")
    image, box = torch.zeros(30, 40, 3, dtype=torch.uint8), torch.tensor([[0.0, 0, 9, 8]])
    assert module.roi_views([image], box, size=8)[0].shape == (1, 3, 8, 8)


def test_what_is_no_folder_of_kernels(tmp_path):
    with pytest.raises(L2R2Error, match=r"build\.toml: cannot be read"):
        prepare_kernels(tmp_path, tmp_path / "out")
    kernels = shutil.copytree(KERNELS, tmp_path / "kernels")
    (kernels / "torch-ext" / "l2r2_kernels" / "roi_views" / "op.py").write_text("raise RuntimeError('broken')")
    (problem,) = prepare_kernels(kernels, tmp_path / "out")[1].problems
    assert problem == "torch-cpu cannot be used (broken)."
    (kernels / "build.toml").write_text('[general]\nname = "x"\n')
    with pytest.raises(L2R2Error, match=r"build\.toml: has no version"):
        prepare_kernels(kernels, tmp_path / "b")

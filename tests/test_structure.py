"""Structural rules: a light import, no package called `kernels`, no upward imports."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ROOT / "l2r2_models"
HEAVY = {"transformers", "triton", "datasets", "accelerate", "sklearn", "skimage", "matplotlib", "captum", "typer"}
HEAVY |= {"gradio", "fastapi", "starlette", "uvicorn", "ray"}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, timm; old = set(sys.modules); import l2r2_models; print(*(set(sys.modules) - old))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(result.stdout.split())


# rooms of l2r2_models by floor, from the ground up; an import goes down, or stays in its room
FLOORS = (
    ("errors", "versions", "hardware"),
    ("io", "config", "distributed", "offline"),
    ("shards",),
    ("locks", "journal", "pipe", "pretrained"),
    ("images",),
    ("boxes",),
    ("views", "fusion"),
    ("models", "data"),
    ("zero_shot",),
    ("runs",),
    ("checkpoints",),
    ("localize",),
    ("predict", "train", "evaluate"),
    ("audit",),
    ("explain", "scale"),
    ("report",),
    ("hub",),
    ("serve",),
    ("demo", "app", "timm_script"),
)


def modules():
    """Name of each module of l2r2_models -> the modules of l2r2_models that it imports, at whatever depth in the file."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PRODUCT.rglob("*.py")}
    found = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom):
                base = package.rsplit(".", node.level - 1)[0] if node.level else ""
                source = ".".join(part for part in (base, node.module) if part)
                inside = {f"{source}.{alias.name}" for alias in node.names}
                found[name] |= {m for m in inside if m in files} or ({source} & set(files))
    return found


def test_every_room_has_a_floor_and_imports_only_go_down():
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    entry = ("l2r2_models", "l2r2_models.__main__")  # the public names, the command
    up = []
    for name, imported in modules().items():
        if name in entry:
            continue
        room = name.split(".")[1]
        assert room in floor, f"{name}: give the new room a floor"
        for other in imported - {name}:
            below = other.partition(".")[2].split(".")[0]
            if below and below != room and floor[below] >= floor[room]:
                up.append(f"{name} imports {other}")
    assert not up


def test_no_modules_import_each_other_in_a_circle():
    graph = modules()
    state = dict.fromkeys(graph, 0)  # 0 new, 1 on the way, 2 done

    def visit(name, way):
        state[name] = 1
        for other in sorted(graph[name] - {name}):
            assert state[other] != 1, f"a circle ends the way {' -> '.join([*way, other])}"
            if state[other] == 0:
                visit(other, [*way, other])
        state[name] = 2

    for name in graph:
        if state[name] == 0:
            visit(name, [name])


def test_the_kernels_know_nothing_of_the_models():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not any(str(n).split(".")[0] in ("l2r2_models", "timm", "transformers") for n in names), path


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_loads_a_model_from_the_repo_root(tmp_path):
    """A package called `kernels` would make transformers believe that Hugging Face's own one is there, and fail."""
    code = f"""
import transformers
from transformers import ViTConfig, ViTModel
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8)
ViTModel(config).save_pretrained({str(tmp_path)!r})
print(type(transformers.AutoModel.from_pretrained({str(tmp_path)!r})).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip().endswith("ViTModel"), result.stderr[-2000:]


def test_no_file_outgrows_400_lines():
    for path in [*(ROOT / "l2r2_models").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_two_test_files_share_a_name():
    """Pytest imports a test file by its bare name: of two with one name, it refuses the second."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))

"""Publish the kernels in the layout of the Kernel Hub: prepare and check the files, push them, and verify the upload.

A kernel repository has one folder per backend (`build/torch-cpu`, `build/torch-cuda`, ...), each with the package and a
`metadata.json`. The builds are on the branch of the kernel's version (`v1`), the card on `main`. The Kernel Hub's kernel-builder
makes the same from `build.toml`; for kernels that are Python only, this module needs no other tool.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import L2R2Error
from ..io import file_sha256, write_json, write_text
from .publish import CARD, Package, Pushed, push, text_problems

OPS = '''"""The namespace of this build's ops, so that two versions in one process do not meet."""


def add_op_namespace_prefix(op_name: str) -> str:
    """Name of an op with its namespace."""
    return f"{namespace}::{{op_name}}"
'''


def prepare_kernels(source: str | Path, folder: Path, repo: str | None = None) -> tuple[Package, Package, str]:
    """Write the repository into `folder`, and compare its CPU build with the installed kernels.

    Args:
        source: folder with `build.toml`, `CARD.md` and `torch-ext/`.
        folder: an empty folder.
        repo: Hub id, which also replaces that of `build.toml` in the card; defaults to that of `build.toml`.

    Returns:
        The card (for main), the builds, and the branch of the builds.

    Raises:
        L2R2Error: when the folder contains no kernels, or kernels that must be compiled.
    """
    source = Path(source)
    general = _read_settings(source)
    module = general["name"].replace("-", "_")
    package = source / "torch-ext" / module
    files = sorted(p.relative_to(package) for p in package.rglob("*.py"))
    if Path("__init__.py") not in files:
        raise L2R2Error(f"{package}: is not a Python package; pass the folder that contains build.toml.")
    named = str(general.get("hub", {}).get("repo-id") or "")
    repo = repo or named
    if not repo or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise L2R2Error(f'"{repo}" is not a Hub id of the form org/name.')
    digest = hashlib.sha256(b"".join(str(p).encode() + (package / p).read_bytes() for p in files)).hexdigest()[:7]
    for backend in general["backends"]:
        build = folder / "build" / f"torch-{backend}"
        for path in files:
            write_text(build / path, (package / path).read_text(encoding="utf-8"))
        namespace = f"_{module}_{backend}_{digest}"
        write_text(build / "_ops.py", OPS.format(namespace=namespace))
        metadata = {
            "name": general["name"],
            "id": namespace,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend},
        }
        write_json(build / "metadata.json", metadata)
    card_text = (source / "CARD.md").read_text(encoding="utf-8")
    if named:  # the card should load the published repository
        card_text = card_text.replace(f'"{named}"', f'"{repo}"')
    write_text(folder / CARD, card_text)
    builds = sorted(p.relative_to(folder).as_posix() for p in (folder / "build").rglob("*") if p.is_file())
    problems = text_problems({name: (folder / name).read_text(encoding="utf-8") for name in (CARD, *builds)})
    if "cpu" in general["backends"]:
        problems += _compare(folder / "build" / "torch-cpu", f"_{module}_cpu_{digest}_test")
    hashes = {name: file_sha256(folder / name) for name in (CARD, *builds)}
    card = Package(repo, folder, {CARD: hashes[CARD]}, tuple(problems))
    return card, Package(repo, folder, {name: hashes[name] for name in builds}, tuple(problems)), f"v{general['version']}"


def new_folder(folder: Path) -> Path:
    """Make a folder to write the repository into.

    Raises:
        L2R2Error: when it is not empty, because its files could be loaded instead of those written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise L2R2Error(f"{folder}: is not empty; choose a new folder.")
    except OSError as error:
        raise L2R2Error(f"{folder}: cannot be written to ({error.strerror}).") from error
    return folder


def push_kernels(card: Package, builds: Package, branch: str, *, private: bool = False) -> Pushed:
    """Push the builds to their branch in one commit that replaces `build/`, and the card to main.

    Args:
        card, builds, branch: see `prepare_kernels`.
        private: see `push`.

    Raises:
        L2R2Error: see `push`.
    """
    pushed = push(builds, private=private, revision=branch, repo_type="kernel", replaces="build/")
    push(card, private=private, repo_type="kernel")
    return pushed


def _read_settings(source: Path) -> dict[str, Any]:
    """The `general` part of `build.toml`, checked."""
    try:
        import tomllib
    except ImportError as error:
        raise L2R2Error("Publishing kernels needs Python 3.11 or newer.") from error
    file = source / "build.toml"
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise L2R2Error(f"{file}: cannot be read ({' '.join(str(error).split())}).") from error
    general: dict[str, Any] = settings.get("general", {})
    if missing := [key for key in ("name", "version", "license", "backends") if key not in general]:
        raise L2R2Error(f"{file}: has no {missing[0]} in the section general; add it.")
    if "torch-noarch" not in settings or "kernel" in settings:
        raise L2R2Error(f"{file}: has kernels that must be compiled; publish them with kernel-builder.")
    return general


def _compare(build: Path, name: str) -> list[str]:
    """Load the build under its own name, as the `kernels` package does, and compare its output with the installed kernels."""
    import l2r2_kernels

    spec = importlib.util.spec_from_file_location(name, build / "__init__.py", submodule_search_locations=[str(build)])
    assert spec is not None and spec.loader is not None
    loaded: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
        image = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        boxes = torch.tensor([[3.0, 4.0, 50.0, 39.0]])
        ours, theirs = (m.roi_views([image], boxes, size=16)[0] for m in (l2r2_kernels, loaded))
    except Exception as error:  # a broken package can raise anything
        return [f"{build.name} cannot be used ({' '.join(str(error).split())[:200]})."]
    finally:
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[module]
    return [] if torch.equal(ours, theirs) else [f"{build.name} does not give the same views as the installed kernels."]

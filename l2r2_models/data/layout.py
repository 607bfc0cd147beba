"""Which files and folders describe a data set on disk."""

from __future__ import annotations

from pathlib import Path

METADATA = ("metadata.csv", "metadata.jsonl")
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))


def metadata_in(folder: Path) -> Path | None:
    """Return the metadata file of a folder, if it has one."""
    return next((folder / name for name in METADATA if (folder / name).exists()), None)


def described_splits(folder: Path) -> dict[Path, Path]:
    """Return the metadata files of the folders train, val and test, by folder; empty unless each of them has one."""
    inside = [path for path in sorted(folder.iterdir()) if path.name.lower() in SPLIT_NAMES and path.is_dir()]
    found = {path: file for path in inside if (file := metadata_in(path)) is not None}
    return found if len(found) == len(inside) else {}

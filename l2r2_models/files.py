"""Writing files so that a killed process never leaves half of one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import L2R2Error


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and move the result to `path` in one step; `path` keeps its old content until then.

    Raises:
        L2R2Error: the folder cannot be written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be written ({error.strerror or error}).") from error
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp makes private files; results are meant to be read
        os.replace(temporary, path)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Remove what a killed `write_atomic` left of `path`; only for its one writer, see `locks`."""
    if len(path.name) > 40:  # a longer name shares its temporary names with others
        return
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    with os.scandir(path.parent) as found:
        for entry in found:
            if ours.fullmatch(entry.name):
                Path(entry.path).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; bytes of a file name that are not UTF-8 become escapes that JSON reads back."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file's content atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write)


def write_json(path: str | Path, data: Any) -> None:
    """Write indented JSON atomically.

    Raises:
        L2R2Error: not writable, or the data hold NaN or infinity, which JSON has not.
    """
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise L2R2Error(f"{path}: cannot be written as JSON ({error}).") from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        L2R2Error: missing or not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise L2R2Error(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 4,300 digits
        raise L2R2Error(f"{path}: is not readable JSON ({' '.join(str(error).split())}).") from error


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content.

    Raises:
        L2R2Error: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be read ({error.strerror or error}).") from error


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()

"""Safe reading of regular files, and atomic writes: a killed process never leaves a partial file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .errors import L2R2Error

_umask = os.umask(0)
os.umask(_umask)
MODE = 0o666 & ~_umask  # permissions of a new file
ARROW = 'Parquet needs pyarrow: pip install "l2r2-models[detect]".'
MAX_BYTES = 512 * 1024 * 1024  # limit for files that are read into memory: images, box files, configurations


def check_readable(path: str | Path, *, most: int | None = MAX_BYTES) -> None:
    """Refuse files that are too large or not regular: a pipe would block forever, a device never ends.

    A missing file passes, because the caller that opens it can report it better.

    Args:
        path: the file; links are followed.
        most: maximum size in bytes; None for no limit.

    Raises:
        L2R2Error: when the file is not regular, or larger than `most`.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise L2R2Error(f"{path}: is not a regular file (a pipe or a device?); pass a regular file.")
    if most is not None and stat.S_ISREG(found.st_mode) and found.st_size > most:
        raise L2R2Error(
            f"{path}: is {found.st_size / 2**20:,.0f} MB, over the limit of {most / 2**20:,.0f} MB; use a smaller file."
        )


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and move the result to `path` in one step; `path` keeps its old content until then.

    Args:
        path: the file to write; missing parent folders are created.
        write: writes the content to the temporary path that it is given.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    path = Path(path)
    try:
        check_readable(path, most=None)  # os.replace would turn /dev/null into a regular file
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be written ({error.strerror or error}).") from error
    try:
        write(Path(temporary))
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else MODE)  # mkstemp creates private files
        os.replace(temporary, path)
    except OSError as error:
        raise L2R2Error(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Remove temporary files that a killed `write_atomic` left for `path`; call it only while holding its lock (`locks`)."""
    if len(path.name) > 40:  # the prefix is truncated, so it may belong to another file
        return
    with os.scandir(path.parent) as found:
        for entry in found:
            if is_temporary(Path(entry.path), path.name):
                Path(entry.path).unlink(missing_ok=True)


def is_temporary(path: Path, name: str) -> bool:
    """Whether `path` is a temporary file of `write_atomic` for a file called `name`.

    >>> is_temporary(Path(".run.json.abcd1234.tmp"), "run.json")
    True
    """
    return re.fullmatch(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.tmp", path.name) is not None


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; characters that UTF-8 cannot encode become escapes that JSON reads back.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes atomically.

    Raises:
        L2R2Error: when the file cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write)


def write_json(path: str | Path, data: Any) -> None:
    """Write indented JSON atomically.

    Raises:
        L2R2Error: when the file cannot be written, or the data contain NaN or infinity, which JSON does not allow.
    """
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise L2R2Error(f"{path}: cannot be written as JSON ({error}).") from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        L2R2Error: when the file is missing or not JSON.
    """
    check_readable(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise L2R2Error(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or over 4,300 digits
        raise L2R2Error(f"{path}: is not readable JSON ({' '.join(str(error).split())}).") from error


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        L2R2Error: when the file is missing, not regular, too large, or not UTF-8.
    """
    check_readable(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise L2R2Error(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


class _NoAliases(yaml.SafeLoader):
    """YAML without aliases, which can refer to themselves or expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text; `name` starts the error message.

    Raises:
        L2R2Error: when the text is not YAML, uses aliases, or is nested too deeply.

    >>> parse_yaml("epochs: 3", "recipe.yaml")
    {'epochs': 3}
    """
    try:
        return yaml.load(text, _NoAliases)
    except RecursionError:
        raise L2R2Error(f"{name}: is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, or over 4,300 digits
        raise L2R2Error(f"{name}: is not valid YAML ({' '.join(str(error).split())[:200]}).") from None


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse `key=value` settings, with values in YAML.

    Raises:
        L2R2Error: when a setting is not of this form, a key is given twice, or a value is not YAML.

    >>> parse_settings(["lr=0.1", "branches=[full]"])
    {'lr': 0.1, 'branches': ['full']}
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise L2R2Error(f'--set takes key=value, got "{setting}".')
        if key in values:
            raise L2R2Error(f"--set {key} is given twice; pass it once.")
        values[key] = parse_yaml(text, f"--set {setting}")
    return values


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        L2R2Error: when the file cannot be read.
    """
    check_readable(path, most=None)
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


def pyarrow() -> tuple[Any, Any]:
    """Import `pyarrow` and `pyarrow.parquet`.

    Raises:
        L2R2Error: when pyarrow is missing.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise L2R2Error(ARROW) from error
    return pa, parquet

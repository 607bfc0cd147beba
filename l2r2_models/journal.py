"""Work done so far, one record for each image, in files that only grow, in the folder `OUT.parts` beside an output.

Saving costs the same however much was saved before. Each run and each of its processes has a file of its own, so nothing is ever
changed; a line that a killed process left half-written is passed over, and its image is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .errors import L2R2Error
from .io import check_readable


@dataclass(frozen=True)
class Part:
    """One file of a journal: what its records were made with, and the records."""

    file: Path
    header: Any

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each record, and where in the file it is."""
        for offset, line in whole_lines(self.file):
            if offset and isinstance(record := parse(line), dict) and isinstance(record.get("file"), str):
                yield offset, record


class Journal:
    """The journal of an output.

    Args:
        out: the output.
        process: rank of this process, where several share the work.
    """

    def __init__(self, out: Path, process: int = 0) -> None:
        self.folder = out.with_name(f"{out.name}.parts")
        self.process = process
        self._file = self.folder
        self._stream: TextIO | None = None
        self._end = 0

    def parts(self) -> Iterator[Part]:
        """The files that hold anything, the oldest first."""
        for file in self._files():
            header = next((parse(line) for _, line in whole_lines(file)), None)
            if header is not None:
                yield Part(file, header)

    def start(self, header: Any) -> None:
        """Begin a file; a place that cannot be written to shows here, before the work.

        Raises:
            L2R2Error: not writable.
        """
        number = 1 + max((int(file.name.split("-")[1]) for file in self._files()), default=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self.folder / f"part-{number:06d}-{self.process}.jsonl"
            self._stream = open(self._file, "x", buffering=1, encoding="ascii")  # noqa: SIM115 (open until `close`)
        except OSError as error:
            raise self._unwritable(error) from error
        self._end = 0
        self.add(header)

    def add(self, record: Any) -> tuple[Path, int]:
        """Append a record; once this returns, it outlives the process. Gives the file and where in it the record begins.

        Raises:
            L2R2Error: not writable, e.g. because the disk is full.
        """
        assert self._stream is not None
        line, offset = json.dumps(record, allow_nan=False) + "\n", self._end
        try:
            self._stream.write(line)
        except OSError as error:
            raise self._unwritable(error) from error
        self._end += len(line)
        return self._file, offset

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk has been said already
                self._stream.close()
            self._stream = None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("part-*-*.jsonl") if file.name.split("-")[1].isdigit())

    def _unwritable(self, error: OSError) -> L2R2Error:
        return L2R2Error(f"{self.folder}: cannot be written ({error.strerror or error}).")


def whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and content of each line that has its end.

    Raises:
        L2R2Error: the file cannot be read.
    """
    check_readable(file, most=None)
    try:
        with open(file, "rb") as stream:
            offset = 0
            for line in stream:
                if line.endswith(b"\n"):
                    yield offset, line
                offset += len(line)
    except OSError as error:
        raise L2R2Error(f"{file}: cannot be read ({error.strerror or error}).") from error


def parse(line: bytes) -> Any:
    """The JSON of a line; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def digest_of(file: str | Path, *facts: Any) -> str:
    """Of the size and modification time of an image file, and of what else its result depends on."""
    return hashlib.sha256(repr((state_of(file), *facts)).encode()).hexdigest()[:16]


def state_of(file: str | Path | None) -> tuple[int, int] | None:
    """Size and modification time; None without a file."""
    try:
        about = os.stat(file) if file is not None else None
    except (OSError, ValueError):
        return None
    return None if about is None else (about.st_size, about.st_mtime_ns)

"""Append-only record of finished work, one record per image, in the folder `OUT.parts` next to an output.

Saving a record costs the same no matter how many there are. Every run and process appends to its own file, so nothing is ever
rewritten; a line that a killed process left incomplete is skipped, and its image is processed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .errors import L2R2Error
from .io import check_readable
from .shards import state_of


@dataclass(frozen=True)
class Part:
    """One file of a journal.

    Attributes:
        file: its path.
        header: the settings that its records were made with.
    """

    file: Path
    header: Any

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Byte offset and content of each record."""
        for offset, line in whole_lines(self.file):
            if offset and isinstance(record := parse(line), dict) and isinstance(record.get("file"), str):
                yield offset, record


class Journal:
    """The journal of an output.

    Args:
        out: the output file or folder.
        process: rank of this process when several share the work.
    """

    def __init__(self, out: Path, process: int = 0) -> None:
        self.folder = out.with_name(f"{out.name}.parts")
        self.process = process
        self._file = self.folder
        self._stream: TextIO | None = None
        self._end = 0

    def parts(self) -> Iterator[Part]:
        """The files that have a header, oldest first."""
        for file in self._files():
            header = next((parse(line) for _, line in whole_lines(file)), None)
            if header is not None:
                yield Part(file, header)

    def start(self, header: Any) -> None:
        """Begin a new file, so that an unwritable folder is reported before the work starts.

        Raises:
            L2R2Error: when the folder cannot be written to.
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
        """Append a record; once this returns, the record survives a killed process.

        Returns:
            The file, and the record's byte offset in it.

        Raises:
            L2R2Error: when the file cannot be written, e.g. because the disk is full.
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
        """Close the current file; does nothing if none is open."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # `add` has already reported a full disk
                self._stream.close()
            self._stream = None

    def modified(self) -> float | None:
        """Time at which the last record was added, in seconds since 1970; None if there is no journal."""
        return max((file.stat().st_mtime for file in self._files()), default=None)

    def remove(self) -> None:
        """Delete the journal's folder, once the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("part-*-*.jsonl") if file.name.split("-")[1].isdigit())

    def _unwritable(self, error: OSError) -> L2R2Error:
        return L2R2Error(f"{self.folder}: cannot be written ({error.strerror or error}).")


def whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of each complete line.

    Raises:
        L2R2Error: when the file cannot be read.
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
    """Parse a line as JSON; None if it is not JSON.

    >>> parse(b'{"file": "a.jpg"}'), parse(b'{"fil')
    ({'file': 'a.jpg'}, None)
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def digest_of(file: str | Path, *others: Any) -> str:
    """Hash the size and modification time of an image file, and anything else that its result depends on."""
    return hashlib.sha256(repr((state_of(file), *others)).encode()).hexdigest()[:16]

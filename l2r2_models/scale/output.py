"""The output folder: one Parquet file per partition, named by its content, and a manifest.

A partition is written once, in one step, so the files that exist are finished.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..boxes.parquet import KEY, MANIFEST, manifest_of
from ..errors import L2R2Error
from ..io import pyarrow
from ..locks import only_writer
from ..predict.formats import parquet_schema
from ..predict.outputs import check_header
from .places import Place, url_of
from .results import Tally

COUNTS = b"l2r2_counts"  # metadata of a partition


class Output:
    """An output folder.

    Args:
        out: path or URL of the folder.
        header: the model and the settings that the rows are made with.

    Raises:
        L2R2Error: when the folder was not made by this module, or with another model or other settings.
    """

    def __init__(self, out: str | Path, header: Mapping[str, Any]) -> None:
        self.place, self.header = Place.of(out), header
        self.name = url_of(out) or str(out)
        self._files = _files_in(self.place)
        if self.place.local and Path(self.place.path).is_file():
            raise L2R2Error(f"{self.name}: is a file; with --engine ray, -o names a folder of partitions.")
        if MANIFEST in self._files:
            check_header(self.name, self._manifest()[0], header)
        elif self._files:
            raise L2R2Error(f"{self.name}: already exists and was not written with --engine ray; choose another -o.")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer of the folder, as far as it is on this machine or mounted there.

        Raises:
            L2R2Error: when another process is writing it.
        """
        with only_writer(Path(self.place.path)) if self.place.local else contextlib.nullcontext():
            yield

    def folder(self, name: str) -> Output:
        """Return an output of the same header in a folder below."""
        return Output(str(self.place.child(name)), self.header)

    def _manifest(self) -> tuple[Any, list[str]]:
        """Return the header, and the names of the partitions in the order of the images."""
        return manifest_of(self._files[MANIFEST].read(), self.name, finished=False)

    def finished(self, keys: Sequence[str]) -> dict[str, Tally]:
        """Return the counts of those partitions that are there and need not be done again."""
        found: dict[str, Tally] = {}
        for key in keys:
            if (file := self._files.get(_file_of(key))) is not None:
                tally = self._tally(file)
                if tally is not None and not tally.retry:
                    found[key] = tally
        return found

    def start(self) -> None:
        """Note that work has begun, so that an unwritable folder is reported before it."""
        before = self._manifest()[1] if MANIFEST in self._files else []
        self._note(before, complete=False)

    def file(self, key: str) -> Place:
        """Return the file of a partition that is there."""
        return self._files[_file_of(key)]

    def write(self, key: str, table: Any, tally: Tally) -> None:
        """Write a partition.

        Args:
            key: its key.
            table: Arrow table with the column `file`.
            tally: counts of it.

        Raises:
            L2R2Error: when it cannot be written.
        """
        _, parquet = pyarrow()
        metadata = {KEY: json.dumps(self.header).encode(), COUNTS: tally.dumps()}
        sink = io.BytesIO()
        parquet.write_table(table.replace_schema_metadata(metadata), sink)
        file = self.place.child(_file_of(key))
        file.write(sink.getvalue())
        self._files[_file_of(key)] = file

    def finish(self, keys: Sequence[str]) -> None:
        """Note that the given partitions are complete.

        Earlier partitions stay, at the end, unless they share an image with these.
        """
        stale = [name for name in self._files if name != MANIFEST and name not in set(map(_file_of, keys))]
        requested = set(self._names(map(_file_of, keys))) if stale else set()
        others = []
        for name in sorted(stale):
            if not _is_partition(name) or not requested.isdisjoint(self._names([name])):
                self._files.pop(name).delete()
            else:
                others.append(name)
        self._note([*map(_file_of, keys), *others], complete=True)

    def _names(self, files: Any) -> Iterator[str]:
        """Yield the names of the images in partitions."""
        _, parquet = pyarrow()
        for name in files:
            with self._files[name].filesystem.open_input_file(self._files[name].path) as stream:
                yield from parquet.read_table(stream, columns=["file"]).column("file").to_pylist()

    def _tally(self, file: Place) -> Tally | None:
        """Return the counts of a partition; None if the file is damaged."""
        pa, parquet = pyarrow()
        try:
            with file.filesystem.open_input_file(file.path) as stream:
                metadata = parquet.read_schema(stream).metadata or {}
            return Tally.parse(metadata[COUNTS])
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
            return None

    def _note(self, files: Sequence[str], complete: bool) -> None:
        data = {"header": self.header, "complete": complete, "partitions": list(files)}
        file = self.place.child(MANIFEST)
        file.write(json.dumps(data).encode() + b"\n")
        self._files[MANIFEST] = file


def read_table(out: str | Path) -> Any:
    """Read the rows of an output folder as one Arrow table, in the order of the images.

    Raises:
        L2R2Error: when the folder is no such output, or is not complete.
    """
    pa, parquet = pyarrow()
    place = Place.of(out)
    files = _files_in(place)
    if MANIFEST not in files:
        raise L2R2Error(f"{out}: is no output of --engine ray.")
    tables = []
    for name in manifest_of(files[MANIFEST].read(), str(out))[1]:
        with files[name].filesystem.open_input_file(files[name].path) as stream:
            tables.append(parquet.read_table(stream).replace_schema_metadata(None))
    return pa.concat_tables(tables) if tables else parquet_schema().empty_table()


def _files_in(folder: Place) -> dict[str, Place]:
    """Return the files in a folder by name, without those in folders below."""
    found = (file for file, _ in folder.files())
    return {name: file for file in found for parent, _, name in [file.path.rpartition("/")] if parent == folder.path.rstrip("/")}


def _file_of(key: str) -> str:
    return f"part-{key}.parquet"


def _is_partition(file: str) -> bool:
    return file.startswith("part-") and file.endswith(".parquet")

"""Prediction files (`.json`, `.jsonl`, `.csv`, `.parquet`): atomic, streaming writes, and reading back.

A `.json` file contains all that the same command needs to continue. The other formats do not, so the journal `OUT.parts` is kept
next to them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ..boxes.parquet import KEY, pyarrow
from ..errors import L2R2Error
from ..io import write_atomic
from ..journal import Journal, parse, whole_lines

NUMBERS = ("x0", "y0", "x1", "y1", "box_score", "score")
COLUMNS = ("file", *NUMBERS[:5], "label", "score", "source", "reason", "failure")
ROWS = 10_000  # Parquet rows held in memory at once
Place = tuple[Path, int]  # a file, and the byte offset of an image's line in it


def check_ending(out: Path) -> None:
    """Check that predictions can be written in the format that the file name ends in.

    Raises:
        L2R2Error: when the extension is unknown, or a package for it is missing.
    """
    if out.suffix.lower() not in _WRITERS:
        raise L2R2Error(f"{out}: unknown format for predictions; the file name must end in {', '.join(_WRITERS)}.")
    if out.suffix.lower() == ".parquet":
        pyarrow()


def holds_all(out: Path) -> bool:
    """Return whether the file alone, without its journal, is enough to continue.

    >>> holds_all(Path("out.json")), holds_all(Path("out.csv"))
    (True, False)
    """
    return out.suffix.lower() == ".json"


def read_predictions(out: Path, journal: Journal, header: Mapping[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield every record of the file and its journal with its location, newest last.

    Args:
        out: prediction file.
        journal: its journal.
        header: header that the records must match.

    Raises:
        L2R2Error: when the file or its journal is damaged, is not a prediction file, or was made with another model or other
            settings.
    """
    parts = list(journal.parts())
    if out.exists() and holds_all(out):
        for offset, record in _images(out, header):
            yield (out, offset), record
    elif out.exists() and not parts:
        raise L2R2Error(f"{out}: already exists, and cannot be continued without {journal.folder}; choose another -o.")
    for part in parts:
        _check_header(journal.folder, part.header, header)
        for offset, record in part.records():
            if _is_whole(record):
                yield (part.file, offset), record


def records_at(places: Iterable[tuple[str, Place]]) -> Iterator[dict[str, Any]]:
    """Yield the records at the given locations, with `file` set to the name given for each."""
    for file, together in groupby(places, lambda item: item[1][0]):
        with open(file, "rb") as stream:
            for name, (_, offset) in together:
                if stream.tell() != offset:
                    stream.seek(offset)
                yield {**json.loads(stream.readline().rstrip(b",\n")), "file": name}


def write_predictions(out: Path, header: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Write records atomically, in the format that the name of `out` ends in.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    write_atomic(out, lambda temporary: _WRITERS[out.suffix.lower()](temporary, header, records))


def _write_json(path: Path, header: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Write one image per line, so that each can be read alone."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # file names that are not UTF-8
        file.write(_line({**header, "images": []})[:-2] + "\n")
        before = ""
        for record in records:
            file.write(before + _line(record))
            before = ",\n"
        file.write("\n]}\n")


def _write_jsonl(path: Path, header: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(_line(_public(record)) + "\n" for record in records)


def _write_csv(path: Path, header: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerows(_rows(record))


def _write_parquet(path: Path, header: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> None:
    pa, parquet = pyarrow()
    fields = [(name, pa.float64() if name in NUMBERS else pa.string()) for name in COLUMNS]
    schema = pa.schema(fields, metadata={KEY: json.dumps(header).encode()})
    rows = ({**row, "file": _text(row["file"])} for record in records for row in _rows(record))
    with parquet.ParquetWriter(path, schema) as writer:
        while held := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(held, schema))


_WRITERS: dict[str, Callable[[Path, Mapping[str, Any], Iterable[dict[str, Any]]], None]] = {
    ".json": _write_json,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per object, or one for the failure."""
    if "failure" in record:
        yield {"file": record["file"], "failure": _text(record["failure"])}
    for o in record.get("objects", ()):
        box = zip(NUMBERS, o.get("box", ()))
        fields = {key: o[key] for key in ("box_score", "label", "score", "source", "reason") if key in o}
        yield {"file": record["file"], **dict(box), **fields}


def _text(text: str) -> str:
    """Escape bytes that are not UTF-8."""
    return text.encode("utf-8", errors="backslashreplace").decode()


def _public(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "digest"}


def _line(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def _images(out: Path, header: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield offset and record of each image in a `.json` file, between the header line and the closing line."""
    if not out.is_file():
        raise L2R2Error(f"{out}: already exists and is not a prediction file; choose another -o.")
    lines = whole_lines(out)
    first = parse(next(lines, (0, b""))[1].rstrip() + b"]}")
    if not isinstance(first, dict) or "model_sha256" not in first:
        raise L2R2Error(f"{out}: already exists and was not written by `l2r2 predict`; choose another -o.")
    _check_header(out, {key: value for key, value in first.items() if key != "images"}, header)
    closed = False
    for number, (offset, line) in enumerate(lines, 2):
        if closed := line == b"]}\n":
            break
        record = parse(line.rstrip(b",\n"))
        if not _is_whole(record):
            if line == b"\n":
                continue
            raise L2R2Error(f"{out}: is damaged (line {number}); remove it or choose another -o.")
        yield offset, record
    if not closed:
        raise L2R2Error(f"{out}: is damaged (its end is missing); remove it or choose another -o.")


def _check_header(place: Path, old: Any, new: Mapping[str, Any]) -> None:
    if not isinstance(old, dict):
        raise L2R2Error(f"{place}: is damaged; remove it or choose another -o.")
    keys = [key for key in {**new, **old} if key != "model"]  # a run may be moved
    if changed := [key for key in keys if old.get(key) != new.get(key)]:
        raise L2R2Error(f"{place}: was made with a different {', '.join(changed)}; remove it or choose another -o.")


def _is_whole(record: Any) -> bool:
    """Return whether a record has the form that `Prediction.to_dict` writes."""
    if not isinstance(record, dict) or not isinstance(record.get("file"), str):
        return False
    if "failure" in record:
        return isinstance(record["failure"], str)
    objects = record.get("objects")
    texts = ("label", "source", "reason")
    return (
        isinstance(objects, list)
        and bool(objects)
        and all(isinstance(o, dict) and all(isinstance(o.get(key), str) for key in texts) for o in objects)
    )

"""Reading of prediction files and their journals, record by record, for the command that continues them.

A file in our JSON contains all that the same command needs to continue. The other formats (see `formats`) do not, so the journal
`OUT.parts` is kept next to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..journal import Journal, parse, whole_lines

Place = tuple[Path, int]  # a file, and the byte offset of an image's line in it


def read_predictions(
    out: Path, journal: Journal, header: Mapping[str, Any], resumable: bool
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Yield every record of the file and its journal with its location, newest last.

    Args:
        out: prediction file.
        journal: its journal.
        header: header that the records must match.
        resumable: whether the format of the file is our JSON, which is enough to continue without the journal.

    Raises:
        L2R2Error: when the file or its journal is damaged, is not a prediction file, or was made with another model or other
            settings.
    """
    parts = list(journal.parts())
    if out.exists() and resumable:
        try:
            old = read_header(out)
        except L2R2Error:
            raise L2R2Error(f"{out}: already exists and was not written by `l2r2 predict` as JSON; choose another -o.") from None
        check_header(out, old, header)
        for offset, record in read_images(out, "; remove it or choose another -o"):
            yield (out, offset), record
    elif out.exists() and not parts:
        raise L2R2Error(f"{out}: already exists, and cannot be continued without {journal.folder}; choose another -o.")
    for part in parts:
        check_header(journal.folder, part.header, header)
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


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file in our JSON: the model and the settings that made it.

    Raises:
        L2R2Error: when it is not such a file.
    """
    first = parse(next(whole_lines(path), (0, b""))[1].rstrip() + b"]}") if path.is_file() else None
    if not isinstance(first, dict) or "model_sha256" not in first:
        raise L2R2Error(f"{path}: is not a JSON file of `l2r2 predict`.")
    return {key: value for key, value in first.items() if key != "images"}


def read_images(path: Path, advice: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield offset and record of each image in our JSON, between the header line and the closing line.

    Raises:
        L2R2Error: when the file is damaged; the message ends with the advice.
    """
    lines = whole_lines(path)
    next(lines, None)
    closed = False
    for number, (offset, line) in enumerate(lines, 2):
        if closed := line == b"]}\n":
            break
        record = parse(line.rstrip(b",\n"))
        if not _is_whole(record):
            if line == b"\n":
                continue
            raise L2R2Error(f"{path}: is damaged (line {number}){advice}.")
        yield offset, record
    if not closed:
        raise L2R2Error(f"{path}: is damaged (its end is missing){advice}.")


def check_header(place: Path | str, old: Any, new: Mapping[str, Any]) -> None:
    """Check that predictions were made with the model and the settings of a header.

    Raises:
        L2R2Error: when they were not, or the old header is no header.
    """
    if not isinstance(old, dict):
        raise L2R2Error(f"{place}: is damaged; remove it or choose another -o.")
    keys = [key for key in {**new, **old} if key not in ("model", "inputs")]  # a run may be moved, and images added
    if changed := [key for key in keys if old.get(key) != new.get(key)]:
        raise L2R2Error(f"{place}: was made with a different {', '.join(changed)}; remove it or choose another -o.")


def _is_whole(record: Any) -> bool:
    """Return whether a record has the form that `Prediction.to_dict` writes."""
    if not isinstance(record, dict) or not isinstance(record.get("file"), str):
        return False
    if "failure" in record:
        return isinstance(record["failure"], str)
    objects, image = record.get("objects"), record.get("image")
    if not isinstance(objects, list) or not objects:
        return False
    needed = [(image, ("label", "reason")), *((o, ("label", "source", "reason")) for o in objects)]
    return all(isinstance(part, dict) and all(isinstance(part.get(key), str) for key in keys) for part, keys in needed)

"""The formats of prediction files, each an atomic, streaming rendering of the same records."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..boxes.parquet import KEY
from ..errors import L2R2Error
from ..io import pyarrow, write_atomic
from .foreign import write_coco, write_megadetector
from .rendering import About, line

GROUP = ("group", "group_label", "group_score")
NUMBERS = ("x0", "y0", "x1", "y1", "box_score", "score", "image_score", "group_score")
COLUMNS = ("file", *NUMBERS[:5], "box_label", "label", "score", "source", "reason", "image_label", "image_score", "failure")
ROWS = 10_000  # Parquet rows held in memory at once


def format_of(out: Path, format: str | None = None) -> str:
    """Return the format that predictions are written in: the given one, or the one of the file's extension.

    Raises:
        L2R2Error: when the format or the extension is unknown, or a package for it is missing.

    >>> format_of(Path("out.csv")), format_of(Path("out.json"), "coco")
    ('csv', 'coco')
    """
    if format is not None and format not in FORMATS:
        raise L2R2Error(f'Unknown format "{format}" for predictions; choose from {", ".join(FORMATS)}.')
    if format is None and (format := ENDINGS.get(out.suffix.lower())) is None:
        raise L2R2Error(
            f"{out}: unknown format for predictions; the file name must end in {', '.join(ENDINGS)}, or use --format."
        )
    if format == "parquet":
        pyarrow()
    return format


def holds_all(format: str) -> bool:
    """Return whether a file of this format alone, without its journal, is enough to continue.

    >>> holds_all("json"), holds_all("csv")
    (True, False)
    """
    return format == "json"


def write_predictions(out: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    """Write records atomically in the format `about.format`.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    write_atomic(out, lambda temporary: FORMATS[about.format](temporary, records, about))


def _write_json(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    """Write one image per line, so that each can be read alone."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # file names that are not UTF-8
        inputs = {"inputs": about.inputs} if about.inputs else {}
        file.write(line({**about.header, **inputs, "images": []})[:-2] + "\n")
        before = ""
        for record in records:
            file.write(before + line(record))
            before = ",\n"
        file.write("\n]}\n")


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(line({k: v for k, v in record.items() if k != "digest"}) + "\n" for record in records)


def _write_csv(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, _columns(about), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerows(_rows(record))


def _write_parquet(path: Path, records: Iterable[dict[str, Any]], about: About) -> None:
    _, parquet = pyarrow()
    with parquet.ParquetWriter(path, parquet_schema(about.header, _columns(about))) as writer:
        for table in parquet_tables(records, _columns(about)):
            writer.write_table(table)


def parquet_schema(header: Mapping[str, Any] | None = None, columns: Sequence[str] = COLUMNS) -> Any:
    """Return the Arrow schema of a prediction file; its metadata hold the header, if one is given."""
    pa, _ = pyarrow()
    fields = [(name, pa.float64() if name in NUMBERS else pa.string()) for name in columns]
    return pa.schema(fields, metadata=None if header is None else {KEY: json.dumps(header).encode()})


def parquet_tables(records: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> Iterator[Any]:
    """Yield the rows of records as Arrow tables of up to `ROWS` rows."""
    pa, _ = pyarrow()
    rows = ({**row, "file": escaped(row["file"])} for record in records for row in _rows(record))
    while held := list(islice(rows, ROWS)):
        yield pa.Table.from_pylist(held, parquet_schema(columns=columns))


FORMATS: dict[str, Callable[[Path, Iterable[dict[str, Any]], About], None]] = {
    "json": _write_json,
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "parquet": _write_parquet,
    "megadetector": write_megadetector,
    "coco": write_coco,
}
ENDINGS = {f".{name}": name for name in ("json", "jsonl", "csv", "parquet")}


def _columns(about: About) -> tuple[str, ...]:
    """Return the columns of a table: those of the group only if images are grouped."""
    return (*COLUMNS, *GROUP) if "group" in about.header["settings"] else COLUMNS


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per object, or one for the failure."""
    of_group = dict(zip(GROUP, (record["group"].get(key) for key in ("name", "label", "score")))) if "group" in record else {}
    if "failure" in record:
        yield {"file": record["file"], **of_group, "failure": escaped(record["failure"])}
    for o in record.get("objects", ()):
        box = zip(NUMBERS, o.get("box", ()))
        fields = {key: o[key] for key in ("box_score", "box_label", "label", "score", "source", "reason") if key in o}
        image = {f"image_{key}": record["image"][key] for key in ("label", "score")}
        yield {"file": record["file"], **dict(box), **fields, **image, **of_group}


def escaped(text: str) -> str:
    r"""Escape bytes that are not UTF-8.

    >>> escaped("caf\udce9.jpg")
    'caf\\udce9.jpg'
    """
    return text.encode("utf-8", errors="backslashreplace").decode()

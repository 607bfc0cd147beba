"""What the readers of published sets share: finding the unpacked archive, reading its tables, and one record per image."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ...boxes.table import Box
from ...errors import L2R2Error
from ...images import is_image_path, load_image
from ...io import check_readable, read_text


@dataclass(frozen=True)
class Item:
    """One image of a published set.

    Attributes:
        image: the file.
        name: its relative path in the imported set, below `images/`.
        columns: its metadata; `label` and `split` first.
        box: of the object, xyxy in pixels with an exclusive end.
        mask: a file that shows the object.
        read_mask: reads `mask` as a bool array `[H, W]`; None where it already is a white object on black.
    """

    image: Path
    name: str
    columns: dict[str, str]
    box: Box | None = None
    mask: Path | None = None
    read_mask: Callable[[Path], np.ndarray] | None = None


def find_root(folder: Path, title: str, needed: tuple[str, ...], below: tuple[str, ...] = ()) -> Path:
    """The folder that holds all of `needed`: `folder` itself, or one of the subfolders `below`.

    Raises:
        L2R2Error: none does; the message says what was looked for.
    """
    if not folder.is_dir():
        raise L2R2Error(f"{folder}: no such folder.")
    for root in (folder, *(folder / name for name in below)):
        if all((root / name).exists() for name in needed):
            return root
    where = f" in it or in its {' or '.join(below)}" if below else " in it"
    raise L2R2Error(f"{folder}: is not {title}; looked for {', '.join(needed)}{where}.")


def read_csv(file: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV with a header.

    Raises:
        L2R2Error: unreadable, empty, or a column of `needed` is missing or has no value in some row.
    """
    check_readable(file)
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise L2R2Error(f"{file}: cannot be read as csv ({error}).") from error
    if not rows:
        raise L2R2Error(f"{file}: has no rows.")
    for number, row in enumerate(rows, 2):
        if lacking := [name for name in needed if not row.get(name)]:
            raise L2R2Error(f'{file}: row {number} has no "{lacking[0]}"; the columns {", ".join(needed)} are needed.')
    return rows


def read_numbered(file: Path) -> dict[str, str]:
    """Lines `ID VALUE...` as a dict, the form of CUB's text files.

    Raises:
        L2R2Error: unreadable, or a line without a value.
    """
    values = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            key, _, value = line.strip().partition(" ")
            if not value:
                raise L2R2Error(f"{file}: line {number} has no value after its id.")
            values[key] = value.strip()
    return values


def value_of(names: dict[str, str], code: str, file: Path, column: str) -> str:
    """The name of a coded value.

    Raises:
        L2R2Error: a code that the set does not document.
    """
    if code not in names:
        raise L2R2Error(f'{file}: {column} is "{code}"; known are {", ".join(names)}.')
    return names[code]


def relative(name: str, file: Path) -> str:
    """A path that a table lists, which must stay inside the set's folder.

    Raises:
        L2R2Error: it is absolute or leads out.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise L2R2Error(f"{file}: lists {name}, which is not a path inside its folder.")
    return path.as_posix()


def images_in(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted; none where there is no such folder."""
    return sorted(p for p in folder.iterdir() if is_image_path(Path(p.name)) and p.is_file()) if folder.is_dir() else []


def folders_in(folder: Path) -> Iterator[Path]:
    """Its subfolders that are not hidden, sorted; none where there is no such folder."""
    if folder.is_dir():
        yield from (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))


def nonzero(file: Path) -> np.ndarray:
    """A mask image as `[H, W]` bool: whatever is not black."""
    return np.asarray(load_image(file)).max(-1) > 0

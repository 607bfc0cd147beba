"""Shared code of the readers of published sets: find the unpacked archive, read its tables, and describe its images."""

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
        image: the image file.
        name: its path in the imported set, relative to `images/`.
        columns: its metadata, `label` and `split` first.
        box: the object's box, xyxy in pixels with an exclusive end.
        mask: the file of the object's mask.
        read_mask: reads `mask` as a bool array `[H, W]`; None if it already is a white object on black.
    """

    image: Path
    name: str
    columns: dict[str, str]
    box: Box | None = None
    mask: Path | None = None
    read_mask: Callable[[Path], np.ndarray] | None = None


def find_root(folder: Path, title: str, needed: tuple[str, ...], below: tuple[str, ...] = ()) -> Path:
    """Find the folder that contains all of `needed`: `folder` itself, or one of the subfolders `below`.

    Args:
        folder: the folder that the user gave.
        title: the set's name, for messages.
        needed: files and folders that identify the set.
        below: names of subfolders to try.

    Raises:
        L2R2Error: when there is none.
    """
    if not folder.is_dir():
        raise L2R2Error(f"{folder}: no such folder.")
    for root in (folder, *(folder / name for name in below)):
        if all((root / name).exists() for name in needed):
            return root
    where = f" in it or in its {' or '.join(below)}" if below else " in it"
    raise L2R2Error(f"{folder}: is not {title}; looked for {', '.join(needed)}{where}.")


def read_csv(file: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Read the rows of a CSV with a header.

    Raises:
        L2R2Error: when the file is unreadable or empty, or a row has no value in a column of `needed`.
    """
    check_readable(file)
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise L2R2Error(f"{file}: cannot be read as CSV ({error}).") from error
    if not rows:
        raise L2R2Error(f"{file}: has no rows.")
    for number, row in enumerate(rows, 2):
        if lacking := [name for name in needed if not row.get(name)]:
            raise L2R2Error(f'{file}: row {number} has no "{lacking[0]}"; the columns {", ".join(needed)} are needed.')
    return rows


def read_numbered(file: Path) -> dict[str, str]:
    """Read lines `ID VALUE...` as a dict, as in CUB's text files.

    Raises:
        L2R2Error: when the file is unreadable, or a line has no value.
    """
    values = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            key, _, value = line.strip().partition(" ")
            if not value:
                raise L2R2Error(f"{file}: line {number} has no value after its id; unpack the archive again.")
            values[key] = value.strip()
    return values


def value_of(names: dict[str, str], code: str, file: Path, column: str) -> str:
    """The name of a coded value.

    Raises:
        L2R2Error: when the code is unknown.

    >>> value_of({"0": "land", "1": "water"}, "1", Path("metadata.csv"), "place")
    'water'
    """
    if code not in names:
        raise L2R2Error(f'{file}: {column} is "{code}"; it must be one of {", ".join(names)}.')
    return names[code]


def relative(name: str, file: Path) -> str:
    r"""Check that a path in a table stays inside the set's folder.

    Raises:
        L2R2Error: when the path is absolute or leads outside.

    >>> relative("images\\a.jpg", Path("metadata.csv"))
    'images/a.jpg'
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise L2R2Error(f"{file}: lists {name}, which is not a path inside its folder; correct the table.")
    return path.as_posix()


def images_in(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted; empty if the folder does not exist."""
    return sorted(p for p in folder.iterdir() if is_image_path(Path(p.name)) and p.is_file()) if folder.is_dir() else []


def folders_in(folder: Path) -> Iterator[Path]:
    """Subfolders that are not hidden, sorted; empty if the folder does not exist."""
    if folder.is_dir():
        yield from (p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))


def nonzero(file: Path) -> np.ndarray:
    """Read a mask image as `[H, W]` bool, True where it is not black."""
    mask: np.ndarray = np.asarray(load_image(file)).max(-1) > 0
    return mask

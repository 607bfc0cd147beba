"""The images to predict, with their boxes and metadata, found among files, folders and data sets."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..boxes import BoxEntry, BoxTable, Frame, read_boxes, read_rows
from ..data.hf_datasets import is_source
from ..data.layout import METADATA, metadata_in
from ..data.shards import packed_in
from ..data.table import read_table
from ..errors import L2R2Error
from ..images import is_image_path, list_images
from ..io import check_readable
from ..shards import SUFFIXES
from .videos import is_video_path


@dataclass(frozen=True)
class Inputs:
    """Images to classify, with their boxes and metadata; the mappings are keyed by `str(path)`.

    Attributes:
        paths: image files.
        entries: box entries.
        masks: mask files.
        labels: true labels.
        oracle: whether the boxes were found with the true labels as prompts.
        columns: metadata columns.
        detector: name of the detector that found the boxes; empty if unknown.
        folder: the folder or data set that all images come from; None if there are several sources.
        categories: ids of the box labels in the MegaDetector file that the boxes come from.
        frames: the frames of videos that a MegaDetector file lists, among the images.
    """

    paths: tuple[Path, ...]
    entries: dict[str, BoxEntry]
    masks: dict[str, Path]
    labels: dict[str, str]
    oracle: bool = False
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    detector: str = ""
    folder: Path | None = None
    categories: dict[str, str] = field(default_factory=dict)
    frames: dict[str, Frame] = field(default_factory=dict)

    def with_boxes(self, table: BoxTable) -> Inputs:
        """Return the inputs with the boxes of a file instead, joined by path.

        Raises:
            L2R2Error: when the file lists none of the images, or a row fits several.
        """
        keys = table.keys_of(self.paths)
        return replace(
            self,
            entries={path: table.entries[key] for path, key in keys.items()},
            oracle=bool(table.info.get("oracle")),
            detector=table.detector,
            categories=table.categories,
            frames={path: table.frames[key] for path, key in keys.items() if key in table.frames},
        )

    def without_boxes(self) -> Inputs:
        """Return the inputs without boxes and masks, for a localizer."""
        return replace(self, entries={}, masks={}, oracle=False, detector="", categories={}, frames={})

    def with_columns(self, file: Path) -> Inputs:
        """Return the inputs with the metadata columns of a .csv or .jsonl file, joined by path.

        Raises:
            L2R2Error: when the file cannot be read, lists none of the images, has different rows for one image, or a row that
                fits several.
        """
        rows: dict[str, dict[str, str]] = {}
        for row in read_rows(file):
            name, values = str(row["file_name"]), {k: str(v) for k, v in row.items() if v is not None}
            if rows.setdefault(name, values) != values:
                raise L2R2Error(f"{file}: has two different rows for {name}; keep one.")
        table = BoxTable({name: BoxEntry() for name in rows}, source=str(file))
        columns = {path: rows[key] for path, key in table.keys_of(self.paths).items()}
        return replace(self, columns=columns)

    def evenly(self, most: int | None) -> Inputs:
        """Keep at most `most` images, evenly spaced; None keeps all."""
        count = len(self.paths) if most is None else min(most, len(self.paths))
        return replace(self, paths=tuple(self.paths[i * len(self.paths) // count] for i in range(count)))


def gather(sources: Sequence[Path], boxes: Path | BoxTable | None = None, split: str | None = None) -> Inputs:
    """Find the images among files and folders, and their boxes.

    Args:
        sources: images, folders of images, or data sets with metadata.csv or .jsonl or in shards, whose boxes are used; patterns
            such as `photos/**/*.jpg`, text files with one of these per line, or `-` to read the lines from standard input.
        boxes: box file to use instead, or its content, joined by path.
        split: use only this split of the data sets.

    Raises:
        L2R2Error: when there is no image, the box file lists none of the images, or `split` is given without a data set.
    """
    found: dict[str, Path] = {}  # by absolute path
    entries: dict[str, BoxEntry] = {}
    masks: dict[str, Path] = {}
    columns: dict[str, dict[str, str]] = {}
    labels: dict[str, str] = {}
    sources = list(expanded(sources))
    detector, folder = "", next((s for s in sources if s.is_dir() and len(sources) == 1), None)
    for source in sources:
        if metadata_in(source) is not None or is_source(source) or packed_in(source):
            table = read_table(source, missing_ok=True)  # a missing image becomes a failed prediction
            table = table.of_split(split) if split else table
            folder = table.root if len(sources) == 1 else None
            detector = str(table.boxes_from.get("localizer", ""))
            boxed = table.entries()
            for row in table.rows:
                name = str(named(row.path, found))
                entries.update({name: boxed[str(row.path)]} if str(row.path) in boxed else {})
                masks.update({name: row.mask_file} if row.mask_file is not None else {})
                labels.update({name: row.label} if row.label else {})
                columns[name] = dict(row.columns)
        elif split:
            raise L2R2Error(f"{source}: --split needs shards, or a folder with {' or '.join(METADATA)}.")
        else:
            for path in list_images([source]):
                named(path, found)
    inputs = Inputs(tuple(found.values()), entries, masks, labels, False, columns, detector, folder)
    if boxes is None:
        return inputs
    return inputs.with_boxes(boxes if isinstance(boxes, BoxTable) else read_boxes(boxes))


def expanded(sources: Iterable[Path], also: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """Yield the sources, with patterns, lists and standard input replaced by what they name.

    A pattern that is also the name of a file is that file. Paths in a list are relative to the working directory.

    Args:
        sources: files, folders, patterns, lists, or `-`.
        also: the files besides images that a pattern matches.

    Raises:
        L2R2Error: when a pattern matches nothing, or a list is empty or cannot be read.
    """
    for source in sources:
        if str(source) == "-":
            yield from _lines("standard input", sys.stdin.buffer.read())
        elif source.suffix.lower() == ".txt" and source.is_file():
            check_readable(source)
            yield from _lines(str(source), source.read_bytes())
        elif glob.has_magic(str(source)) and not is_source(source) and not source.exists():
            recursive = "**" in str(source)  # then the images of a matching folder match too
            matches = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
            found = [path for path in matches if is_image_path(path) or also(path) or (path.is_dir() and not recursive)]
            found = found or [path for path in matches if path.suffix.lower() in SUFFIXES]
            if not found:
                hint = "; for videos, pass --frames FOLDER" if any(map(is_video_path, matches)) else ""
                raise L2R2Error(f"{source}: no image and no folder matches this pattern{hint}.")
            yield from found
        else:
            yield source


def _lines(name: str, content: bytes) -> list[Path]:
    """Return the paths in a list, one per line; names need not be UTF-8."""
    if not (lines := [line.strip() for line in content.splitlines() if line.strip()]):
        raise L2R2Error(f"{name}: has no lines; write one path per line.")
    if any(b"\0" in line for line in lines):
        raise L2R2Error(f"{name}: is not a list of paths; write one path per line.")
    return [Path(os.fsdecode(line)) for line in lines]


def named(path: Path, found: dict[str, Path]) -> Path:
    """Return the path under which the image is already known, or register this one."""
    return found.setdefault(os.path.abspath(path), path)

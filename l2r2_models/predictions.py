"""A file of predictions: made in batches, written atomically as it grows, and continued by the same call."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .box_files import BoxEntry, read_boxes
from .data.sources import is_source
from .data.table import METADATA, read_table
from .errors import L2R2Error
from .files import file_sha256, read_json, write_json
from .images import list_images
from .predictor import LOCALIZER_FAILED, Prediction, Predictor

SAVE_EVERY = 30.0  # seconds
FORMAT_VERSION = "1.0"


@dataclass(frozen=True)
class Inputs:
    """What to classify: files, the box entries, masks and labels that some of them have, the files that boxes are from, and
    whether the boxes were found with the true labels as prompts (`oracle`)."""

    paths: tuple[Path, ...]
    entries: dict[str, BoxEntry]
    masks: dict[str, Path]
    box_files: tuple[Path, ...]
    labels: dict[str, str]
    oracle: bool = False

    def without_boxes(self) -> Inputs:
        """The images alone, for a localizer."""
        return replace(self, entries={}, masks={}, box_files=(), oracle=False)


@dataclass(frozen=True)
class Report:
    """What a call left in the file: the images asked for, in order, and how many of them were there before."""

    images: list[dict[str, Any]]
    kept: int

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [image for image in self.images if "failure" in image]

    @property
    def localizer_failures(self) -> list[str]:
        """The reasons of the answers that are the whole image's because the localizer failed, one an image."""
        return [image["objects"][0]["reason"] for image in self.images if not _was_looked_at(image)]

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [o for image in self.images for o in image.get("objects", ())]


def gather(sources: Sequence[Path], boxes: Path | None = None, split: str | None = None) -> Inputs:
    """Find the images among files and folders, and their boxes.

    Args:
        sources: images, folders of images, or data sets with metadata.csv or .jsonl, whose boxes are used.
        boxes: a box file instead, joined by path.
        split: only this split of the data sets.

    Raises:
        L2R2Error: nothing there, or the boxes belong to no image.
    """
    paths: dict[Path, None] = {}
    entries: dict[str, BoxEntry] = {}
    masks: dict[str, Path] = {}
    box_files: list[Path] = []
    labels: dict[str, str] = {}
    for source in sources:
        if is_source(source) or (source.is_dir() and any((source / name).exists() for name in METADATA)):
            table = read_table(source, missing_ok=True)  # a missing image is one failure among the answers
            box_files += [table.root / name for name in METADATA if (table.root / name).exists()]
            table = table.of_split(split) if split else table
            paths.update((row.path, None) for row in table.rows)
            entries.update(table.entries())
            masks.update((str(row.path), row.mask_file) for row in table.rows if row.mask_file is not None)
            labels.update((str(row.path), row.label) for row in table.rows if row.label)
        elif split:
            raise L2R2Error(f"{source}: --split needs a folder with {' or '.join(METADATA)}.")
        else:
            paths.update((path, None) for path in list_images([source]))
    oracle = False
    if boxes is not None:
        found = read_boxes(boxes)
        entries, box_files, oracle = found.join(paths), [boxes], bool(found.info.get("oracle"))
    return Inputs(tuple(paths), entries, masks, tuple(box_files), labels, oracle)


def predict_to_file(
    predictor: Predictor,
    inputs: Inputs,
    out: Path,
    progress: Callable[[Iterable[Prediction], int], Iterable[Prediction]] = lambda items, _: items,
) -> Report:
    """Classify into a JSON file. Answers that the file holds already are kept; failures, also of the localizer, are tried again.

    Raises:
        L2R2Error: the file was made with another model, other boxes or settings, or cannot be written.
    """
    header = _header(predictor, inputs)
    finished = _finished(out, header)
    again = set() if predictor.localizer is None else {name for name, image in finished.items() if not _was_looked_at(image)}
    todo = [path for path in inputs.paths if str(path) not in finished or str(path) in again]
    names = [str(path) for path in inputs.paths]
    _write(out, header, finished, names)  # a file that cannot be written shows before the work, not after it
    saved = time.monotonic()
    try:
        for prediction in progress(predictor.predict_files(todo, inputs.entries, inputs.masks), len(todo)):
            finished[str(prediction.file)] = prediction.to_dict()
            if time.monotonic() - saved >= SAVE_EVERY:
                _write(out, header, finished, names)
                saved = time.monotonic()
    finally:  # an interruption keeps what is done
        _write(out, header, finished, names)
    return Report([finished[name] for name in names], len(names) - len(todo))


def _was_looked_at(image: Mapping[str, Any]) -> bool:
    """Whether the answers for an image are not those of the whole image because the localizer failed."""
    return not any(o["reason"].startswith(LOCALIZER_FAILED) for o in image.get("objects", ()))


def accuracy_by_branch(images: Sequence[Mapping[str, Any]], truth: Mapping[str, str]) -> dict[str, float]:
    """Part of the images whose first object each branch, and the fused answer, names rightly.

    Args:
        images: as in a file of predictions, none failed. Where no object was found, the full branch answers for fg too.
        truth: label by file.

    Returns:
        Accuracy in [0, 1] by `full`, `fg` (where the model has them) and `fused`.
    """
    firsts = [(image["objects"][0], truth[image["file"]]) for image in images]
    branches = [b for b in ("full", "fg") if any(b in answer for answer, _ in firsts)]
    said = {b: [answer.get(b, answer)["label"] == label for answer, label in firsts] for b in branches}
    said["fused"] = [answer["label"] == label for answer, label in firsts]
    return {name: sum(right) / len(right) for name, right in said.items()}


def _header(predictor: Predictor, inputs: Inputs) -> dict[str, Any]:
    origin = None if predictor.localizer is None else predictor.localizer.info
    return {
        "format_version": FORMAT_VERSION,
        "model": predictor.checkpoint.name,
        "model_sha256": predictor.checkpoint.digest,
        "labels": list(predictor.labels),
        "fusion": predictor.model.fusion.config(),
        "views": predictor.model.view_spec.to_dict(),
        "localizer": origin,
        "masks": _digest(inputs.masks),
        "boxes_sha256": [file_sha256(file) for file in inputs.box_files],
        **({"oracle": True} if inputs.oracle or (origin or {}).get("oracle") else {}),  # boxes of true labels as prompts
        "settings": {
            "box_threshold": predictor.box_threshold,
            "max_objects": predictor.max_objects,
            "top": predictor.top,
            "topk_prompts": predictor.topk_prompts,
        },
    }


def _digest(masks: Mapping[str, Path]) -> str | None:
    """Of the masks' names, sizes and times; None without masks."""
    if not masks:
        return None
    states = [(name, *((s := mask.stat()).st_size, s.st_mtime_ns)) if mask.exists() else (name,) for name, mask in masks.items()]
    return hashlib.sha256(repr(sorted(states)).encode()).hexdigest()


def _finished(out: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if not out.exists():
        return {}
    old = read_json(out)
    images = old.get("images") if isinstance(old, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) and "file" in image for image in images):
        raise L2R2Error(f"{out}: exists and is not a file of predictions; choose another -o.")
    if changed := [key for key in header if key != "model" and old.get(key) != header[key]]:
        raise L2R2Error(f"{out}: was made with another {', '.join(changed)}; remove it or choose another -o.")
    return {image["file"]: image for image in images if "failure" not in image}


def _write(out: Path, header: dict[str, Any], finished: dict[str, dict[str, Any]], names: list[str]) -> None:
    asked = set(names)
    order = [*names, *(name for name in finished if name not in asked)]  # earlier answers for other images stay
    write_json(out, {**header, "images": [finished[name] for name in order if name in finished]})

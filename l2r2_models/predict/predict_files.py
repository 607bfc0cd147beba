"""A file of predictions: made in batches, each kept in a journal at once, and continued by the same call."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..boxes import BoxEntry, read_boxes
from ..data.hf_datasets import is_source
from ..data.table import METADATA, read_table
from ..errors import L2R2Error
from ..fusion import Grouping, GroupShare
from ..images import list_images
from ..journal import Journal, digest_of, state_of
from ..locks import only_writer
from .adapt import adapt_records
from .outputs import Place, check_ending, holds_all, read_predictions, records_at, write_predictions
from .prediction import Prediction
from .predictor import LOCALIZER_FAILED, Predictor

FORMAT_VERSION = "1.0"


@dataclass(frozen=True)
class Inputs:
    """What to classify: files, the box entries, masks and labels that some of them have, and whether the boxes were found with
    the true labels as prompts (`oracle`); and the metadata columns of those that have any."""

    paths: tuple[Path, ...]
    entries: dict[str, BoxEntry]
    masks: dict[str, Path]
    labels: dict[str, str]
    oracle: bool = False
    columns: dict[str, dict[str, str]] = field(default_factory=dict)

    def without_boxes(self) -> Inputs:
        """The images alone, for a localizer."""
        return replace(self, entries={}, masks={}, oracle=False)

    def evenly(self, most: int | None) -> Inputs:
        """At most so many of the images, evenly from all; None keeps all."""
        count = len(self.paths) if most is None else min(most, len(self.paths))
        return replace(self, paths=tuple(self.paths[i * len(self.paths) // count] for i in range(count)))


@dataclass(frozen=True)
class Report:
    """What a call left in the file.

    Attributes:
        total: images asked for.
        kept: how many of them were there before.
        failures: those without an answer.
        localizer_failures: the reasons of the answers that are the whole image's because the localizer failed, one an image.
        sources: how many objects have which `source`.
        shares: how many backgrounds mislead, by group, where predictions are adapted.
    """

    total: int
    kept: int
    read: Callable[[], Iterator[dict[str, Any]]] = field(repr=False)
    failures: list[dict[str, Any]] = field(default_factory=list)
    localizer_failures: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    shares: dict[str, GroupShare] = field(default_factory=dict)

    @property
    def images(self) -> list[dict[str, Any]]:
        """The images asked for, in order, as they stand in the file; read from it."""
        return list(self.read())

    def count(self, image: dict[str, Any]) -> dict[str, Any]:
        """Take an image into the account, and give it back."""
        objects = image.get("objects", ())
        self.sources.update(o["source"] for o in objects)
        if "failure" in image:
            self.failures.append(image)
        elif not _was_looked_at(image):
            self.localizer_failures.append(objects[0]["reason"])
        return image


def gather(sources: Sequence[Path], boxes: Path | None = None, split: str | None = None) -> Inputs:
    """Find the images among files and folders, and their boxes.

    Args:
        sources: images, folders of images, or data sets with metadata.csv or .jsonl, whose boxes are used.
        boxes: a box file instead, joined by path.
        split: only this split of the data sets.

    Raises:
        L2R2Error: nothing there, or the boxes belong to no image.
    """
    found: dict[str, Path] = {}  # by where they lead
    entries: dict[str, BoxEntry] = {}
    masks: dict[str, Path] = {}
    columns: dict[str, dict[str, str]] = {}
    labels: dict[str, str] = {}
    for source in sources:
        if is_source(source) or (source.is_dir() and any((source / name).exists() for name in METADATA)):
            table = read_table(source, missing_ok=True)  # a missing image is one failure among the answers
            table = table.of_split(split) if split else table
            boxed = table.entries()
            for row in table.rows:
                name = str(_named(row.path, found))
                entries.update({name: boxed[str(row.path)]} if str(row.path) in boxed else {})
                masks.update({name: row.mask_file} if row.mask_file is not None else {})
                labels.update({name: row.label} if row.label else {})
                columns[name] = dict(row.columns)
        elif split:
            raise L2R2Error(f"{source}: --split needs a folder with {' or '.join(METADATA)}.")
        else:
            for path in list_images([source]):
                _named(path, found)
    oracle = False
    if boxes is not None:
        table_of_boxes = read_boxes(boxes)
        entries, oracle = table_of_boxes.join(found.values()), bool(table_of_boxes.info.get("oracle"))
    return Inputs(tuple(found.values()), entries, masks, labels, oracle, columns)


def _named(path: Path, found: dict[str, Path]) -> Path:
    """The path by which the image is known already, or this one from now on."""
    return found.setdefault(os.path.abspath(path), path)


def predict_to_file(
    predictor: Predictor,
    inputs: Inputs,
    out: Path,
    progress: Callable[[Iterable[Prediction], int], Iterable[Prediction]] = lambda items, _: items,
    adapt: str = "off",
) -> Report:
    """Classify into a file, JSON, JSONL, CSV or Parquet by its ending.

    Answers that are there already are kept as long as the image, its boxes and its mask are the same; failures, also of the
    localizer, are tried again. What is done so far lies in a journal beside the file (see `journal`), so that an interruption at
    any moment loses the images of one batch.

    With `adapt` (see `Grouping.parse`) the images of one place are fused together once all are there. Their branch logits are
    kept, so that no image is looked at again when another joins it.

    Raises:
        L2R2Error: the grouping cannot be had or does not suit the model, or the file was made with another model or other
            settings, is written by another process, or cannot be written.
    """
    check_ending(out)
    header, asked = _header(predictor, inputs), _by_place(inputs.paths)
    if (grouping := Grouping.parse(adapt)) is not None:
        header["settings"]["adapt"] = str(grouping)
        adapter, predictor = predictor.adapter(grouping.noun), predictor.keeping_logits()
        names = [str(path) for path in asked.values()]
        groups = dict(zip(names, grouping.of(names, [inputs.columns.get(name, {}) for name in names])))
    digests = {key: _digest(predictor, inputs, str(path)) for key, path in asked.items()}
    with only_writer(out):
        journal = Journal(out)
        places, finished = _known(read_predictions(out, journal, header), digests, retry=predictor.localizer is not None)
        todo = [path for key, path in asked.items() if key not in finished]
        if todo:
            journal.start(header)
        try:
            for prediction in progress(predictor.predict_files(todo, inputs.entries, inputs.masks), len(todo)):
                key = os.path.abspath(str(prediction.file))
                places[key] = journal.add({**prediction.to_dict(), "digest": digests[key]})
        finally:
            journal.close()
        listed = [(str(path), places.pop(key)) for key, path in asked.items()]

        def finished_images(read: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
            return read() if grouping is None else adapt_records(adapter, read, groups)

        def read_back() -> Iterator[dict[str, Any]]:
            return _first_of(out, journal, header, listed)

        read = read_back if holds_all(out) else lambda: finished_images(read_back)
        report = Report(len(listed), len(listed) - len(todo), read)
        others = ((key, place) for key, place in places.items())  # earlier answers for other images stay, behind
        write_predictions(out, header, chain(map(report.count, finished_images(lambda: records_at(listed))), records_at(others)))
        if grouping is not None:
            report.shares.update(adapter.shares)
        if holds_all(out):
            journal.remove()
    return report


def _by_place(paths: Iterable[Path]) -> dict[str, Path]:
    """Paths by where they lead: one image, whichever way it is named."""
    found: dict[str, Path] = {}
    for path in paths:
        _named(path, found)
    return found


def _known(
    found: Iterable[tuple[Place, dict[str, Any]]], digests: Mapping[str, str], retry: bool
) -> tuple[dict[str, Place], set[str]]:
    """Where the newest record of each image is, and the images with an answer that still holds.

    Args:
        found: records, the newest last.
        digests: of the images asked for, as they are now.
        retry: whether answers without the localizer are tried again.
    """
    places: dict[str, Place] = {}
    finished: set[str] = set()
    for place, image in found:
        key = os.path.abspath(image["file"])
        holds = "failure" not in image and image.get("digest") == digests.get(key) and (not retry or _was_looked_at(image))
        if holds or key not in finished:
            places[key] = place
        if holds:
            finished.add(key)
    return places, finished


def _first_of(
    out: Path, journal: Journal, header: Mapping[str, Any], listed: Sequence[tuple[str, Place]]
) -> Iterator[dict[str, Any]]:
    """The images asked for, from the file, or from the journal where the file does not hold all."""
    if not holds_all(out):
        return records_at(listed)
    return islice((image for _, image in read_predictions(out, journal, header)), len(listed))


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
        **({"oracle": True} if inputs.oracle or (origin or {}).get("oracle") else {}),  # boxes of true labels as prompts
        "settings": {
            "box_threshold": predictor.box_threshold,
            "max_objects": predictor.max_objects,
            "top": predictor.top,
            "topk_prompts": predictor.topk_prompts,
        },
    }


def _digest(predictor: Predictor, inputs: Inputs, name: str) -> str:
    """Of all that the answers for one image depend on beside the header: the file, its boxes, its mask."""
    about = None if predictor.localizer is None else predictor.localizer.about(name)
    return digest_of(name, inputs.entries.get(name), state_of(inputs.masks.get(name)), about)

"""Write predictions to a file, batch by batch with a journal, so that the same call continues after an interruption."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..fusion import Grouping, GroupShare
from ..journal import Journal, digest_of
from ..locks import only_writer
from ..shards import state_of
from .adapt import Adapter, adapt_records
from .formats import format_of, holds_all, write_predictions
from .groups import with_groups
from .inputs import Inputs, named
from .outputs import Place, read_predictions, records_at
from .prediction import LOCALIZER_FAILED, Prediction
from .predictor import Predictor
from .rendering import About

FORMAT_VERSION = "1.1"


@dataclass
class Report:
    """Summary of a call of `predict_to_file`.

    Attributes:
        total: number of requested images.
        kept: number of those whose prediction was already in the file.
        read: returns an iterator over the records of the requested images.
        failures: records of images without a prediction.
        localizer_failures: reasons why the localizer failed, one per image that was classified as a whole for that reason.
        sources: number of objects by `source`.
        found: number of objects by whether one was found; otherwise the whole image was classified.
        skipped: number of objects that a cascade classified without the whole image.
        shares: fraction of misleading backgrounds by group, if predictions are adapted.
    """

    total: int
    kept: int
    read: Callable[[], Iterator[dict[str, Any]]] = field(repr=False)
    failures: list[dict[str, Any]] = field(default_factory=list)
    localizer_failures: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    found: Counter[bool] = field(default_factory=Counter)
    skipped: int = 0
    shares: dict[str, GroupShare] = field(default_factory=dict)

    @property
    def images(self) -> list[dict[str, Any]]:
        """Records of the requested images, in order, read from the file."""
        return list(self.read())

    def count(self, image: dict[str, Any]) -> dict[str, Any]:
        """Add a record to the summary and return it."""
        objects = image.get("objects", ())
        self.sources.update(o["source"] for o in objects)
        self.found.update("fg" in o for o in objects)
        self.skipped += sum("fg" in o and "full" not in o for o in objects)
        if "failure" in image:
            self.failures.append(image)
        elif not _was_localized(image):
            self.localizer_failures.append(objects[0]["reason"])
        return image


def predict_to_file(
    predictor: Predictor,
    inputs: Inputs,
    out: Path,
    progress: Callable[[Iterable[Prediction], int], Iterable[Prediction]] = lambda items, _: items,
    adapt: str = "off",
    format: str | None = None,
    store_logits: bool = False,
    group: str | None = None,
) -> Report:
    """Classify images and write the predictions to a file.

    Predictions that the file already holds are kept if the image, its boxes and its mask are unchanged; failures, including
    those of the localizer, are retried. Finished batches are stored in a journal next to the file (see `journal`), so an
    interruption loses at most one batch.

    With `adapt`, images taken at the same place are fused jointly once all are predicted. Their branch logits are stored, so
    adding an image later does not run the network on the others again.

    Args:
        predictor: makes the predictions.
        inputs: images to classify.
        out: file to write.
        progress: wraps the predictions; takes their iterable and their number.
        adapt: grouping of images taken at the same place, see `Grouping.parse`.
        format: format of the file, see `format_of`; None for the one of its extension.
        store_logits: keep the branch logits of every object, for `fuse_again`.
        group: also predict for groups of images (see `with_groups`): `folder`, `sequence:SECONDS`, or a metadata column.

    Returns:
        A summary of the call.

    Raises:
        L2R2Error: when the format or the grouping is invalid, the model or the format does not support an option, or when the
            file was made with another model or other settings, is being written by another process, or cannot be written.
    """
    format = format_of(out, format)
    if predictor.rules.prior is not None and (store_logits or adapt != "off"):
        raise L2R2Error("A prior cannot be combined with --adapt or --store-logits, which do without it; use one of them.")
    if group is not None and format in ("megadetector", "coco"):
        raise L2R2Error(f"{out}: the format {format} has no place for --group; write json, jsonl, csv or parquet.")
    header, asked = header_of(predictor, inputs.oracle), _by_place(inputs.paths)
    if store_logits:
        if format != "json":
            raise L2R2Error(f"{out}: --store-logits needs the format json, which `l2r2 fuse --predictions` reads.")
        header["settings"]["store_logits"] = True
        predictor = predictor.keeping_logits()
    if (grouping := Grouping.parse(adapt)) is not None:
        header["settings"]["adapt"] = str(grouping)
        adapter, predictor = adapter_of(predictor, grouping), predictor.keeping_logits()
        groups = _groups_of(inputs, asked, grouping)
    sets = {} if group is None else _named_groups(inputs, asked, header, group)
    digests = {key: _digest(predictor, inputs, str(path)) for key, path in asked.items()}
    with only_writer(out):
        journal = Journal(out)
        earlier = read_predictions(out, journal, header, holds_all(format))
        places, finished = _known(earlier, digests, retry=predictor.localizer is not None)
        todo = [path for key, path in asked.items() if key not in finished]
        if todo:
            journal.start(header)
        try:
            for prediction in progress(predictor.predict_files(todo, inputs.entries, inputs.masks), len(todo)):
                key = os.path.abspath(str(prediction.file))
                of_video = _frame(inputs, str(asked[key]))
                places[key] = journal.add({**prediction.to_dict(), **of_video, "digest": digests[key]})
        finally:
            journal.close()
        listed = [(str(path), places.pop(key)) for key, path in asked.items()]

        def finished_images(read: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
            def adapted() -> Iterator[dict[str, Any]]:
                return read() if grouping is None else adapt_records(adapter, read, groups)

            return adapted() if group is None else with_groups(adapted, sets)

        def read_back() -> Iterator[dict[str, Any]]:
            return _first_of(out, journal, header, listed, holds_all(format))

        read = read_back if holds_all(format) else lambda: finished_images(read_back)
        report = Report(len(listed), len(listed) - len(todo), read)
        others = ((key, place) for key, place in places.items())  # earlier predictions for other images stay, at the end
        records = chain(map(report.count, finished_images(lambda: records_at(listed))), records_at(others))
        about = About(format, header, inputs.detector, inputs.folder, journal.modified(), inputs.categories)
        write_predictions(out, records, about)
        if grouping is not None:
            report.shares.update(adapter.shares)
        if holds_all(format):
            journal.remove()
    return report


def adapter_of(predictor: Predictor, grouping: Grouping) -> Adapter:
    """Return what fuses the predictions of a group jointly.

    Raises:
        L2R2Error: when the predictor abstains, or its fusion has no batch rule.
    """
    if predictor.rules.abstain is not None:
        raise L2R2Error("The risk of --abstain was fitted without --adapt and does not hold with it; use one or the other.")
    return predictor.adapter(grouping.noun)


def _by_place(paths: Iterable[Path]) -> dict[str, Path]:
    """Index paths by absolute path, so that each image occurs once."""
    found: dict[str, Path] = {}
    for path in paths:
        named(path, found)
    return found


def _groups_of(inputs: Inputs, asked: Mapping[str, Path], grouping: Grouping) -> dict[str, str]:
    """Return the group of each image by its name."""
    names = [str(path) for path in asked.values()]
    return dict(zip(names, grouping.of(names, [inputs.columns.get(name, {}) for name in names])))


def _named_groups(inputs: Inputs, asked: Mapping[str, Path], header: dict[str, Any], group: str) -> dict[str, str]:
    """Return the group of each image by its name, and note the grouping in the header."""
    kind = group.partition(":")[0]
    grouping = Grouping.parse(group if kind in ("folder", "sequence", "batch") else f"group:{group}")
    assert grouping is not None
    header["settings"]["group"] = str(grouping)
    return _groups_of(inputs, asked, grouping)


def _known(
    found: Iterable[tuple[Place, dict[str, Any]]], digests: Mapping[str, str], retry: bool
) -> tuple[dict[str, Place], set[str]]:
    """Return the location of the newest record per image, and the images whose prediction is still valid.

    Args:
        found: records with their locations, newest last.
        digests: current digests of the requested images.
        retry: whether to retry predictions for which the localizer failed.
    """
    places: dict[str, Place] = {}
    finished: set[str] = set()
    for place, image in found:
        key = os.path.abspath(image["file"])
        holds = "failure" not in image and image.get("digest") == digests.get(key) and (not retry or _was_localized(image))
        if holds or key not in finished:
            places[key] = place
        if holds:
            finished.add(key)
    return places, finished


def _first_of(
    out: Path, journal: Journal, header: Mapping[str, Any], listed: Sequence[tuple[str, Place]], resumable: bool
) -> Iterator[dict[str, Any]]:
    """Yield the requested images from the file, or from the journal if the file alone is not enough."""
    if not resumable:
        return records_at(listed)
    return islice((image for _, image in read_predictions(out, journal, header, resumable)), len(listed))


def _was_localized(image: Mapping[str, Any]) -> bool:
    """Return whether the localizer ran without failing on an image."""
    return not any(o["reason"].startswith(LOCALIZER_FAILED) for o in image.get("objects", ()))


def accuracy_by_branch(images: Sequence[Mapping[str, Any]], truth: Mapping[str, str]) -> dict[str, float]:
    """Compute the accuracy of each branch and of the fused prediction on the first object of each image.

    Args:
        images: records of a prediction file, without failures. If no object was found, the full branch counts for fg too.
        truth: label by file.

    Returns:
        Accuracy in [0, 1] by `full` and `fg` (if the model has them) and `fused`.

    >>> image = {"file": "a.jpg", "objects": [{"label": "cat", "fg": {"label": "cat"}, "full": {"label": "dog"}}]}
    >>> accuracy_by_branch([image], {"a.jpg": "cat"})
    {'full': 0.0, 'fg': 1.0, 'fused': 1.0}
    """
    firsts = [(image["objects"][0], truth[image["file"]]) for image in images]
    branches = [b for b in ("full", "fg") if any(b in answer for answer, _ in firsts)]
    correct = {b: [answer.get(b, answer)["label"] == label for answer, label in firsts] for b in branches}
    correct["fused"] = [answer["label"] == label for answer, label in firsts]
    return {name: sum(right) / len(right) for name, right in correct.items()}


def header_of(predictor: Predictor, oracle: bool = False) -> dict[str, Any]:
    """Return the fields of a prediction file that say how its predictions were made.

    Args:
        predictor: makes the predictions.
        oracle: whether the boxes were found with the true labels as prompts.
    """
    origin = None if predictor.localizer is None else predictor.localizer.info
    return {
        "format_version": FORMAT_VERSION,
        "model": predictor.checkpoint.name,
        "model_sha256": predictor.checkpoint.digest,
        "labels": list(predictor.labels),
        "fusion": predictor.model.fusion.config(),
        "views": predictor.model.view_spec.to_dict(),
        "localizer": origin,
        **({"oracle": True} if oracle or (origin or {}).get("oracle") else {}),
        "settings": {
            "box_threshold": predictor.box_threshold,
            "max_objects": predictor.max_objects,
            "top": predictor.top,
            "topk_prompts": predictor.topk_prompts,
            **({"precision": predictor.network.precision} if predictor.network.precision != "fp32" else {}),
            **({} if predictor.network.cascade is None else {"cascade": asdict(predictor.network.cascade)}),
            **({"image_rule": predictor.image_rule} if predictor.image_rule != "best" else {}),
            **predictor.rules.settings(),
        },
    }


def _digest(predictor: Predictor, inputs: Inputs, name: str) -> str:
    """Hash everything besides the header that the prediction for an image depends on: the file, its boxes and its mask."""
    about = None if predictor.localizer is None else predictor.localizer.about(name)
    prior = () if predictor.rules.prior is None else (predictor.rules.prior.about(name),)
    return digest_of(
        name, inputs.entries.get(name), state_of(inputs.masks.get(name)), about, *prior, *_frame(inputs, name).values()
    )


def _frame(inputs: Inputs, name: str) -> dict[str, Any]:
    """Return the field of a record that says of which video an image is a frame; empty for other images."""
    frame = inputs.frames.get(name)
    return {} if frame is None else {"frame": asdict(frame)}

"""The stages that Ray Data runs: classes that are created once per worker and called with one partition or slice at a time.

A row between stages is `{key, slice, data}`. The slices of a partition are numbered from 0; the last one is empty and marks its
end.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..boxes import BoxEntry, BoxTable
from ..errors import L2R2Error
from ..pipe import in_order
from ..predict.items import Item, pixels_of
from ..predict.prediction import Prediction
from ..predict.predictor import Predictor
from ..predict.rules import Rules
from .partitions import Partition
from .places import Place
from .results import Rows
from .shards import images_of_shard

Row = dict[str, list[Any]]
SLICE = 1024  # predictions per slice
HEAVY = 8_000_000  # pixels per slice of decoded images, 24 MB


@dataclass(frozen=True)
class Plan:
    """How a worker makes its predictor.

    Attributes:
        run: run folder or Hub id.
        digest: hash of the checkpoint that the predictions are made with.
        options: arguments of `Predictor`.
        rules: see `Predictor.with_rules`.
        keep_logits: whether to keep the branch logits.
        boxes: box file for the images in shards.
        folder: working directory, to which names are relative.
    """

    run: str
    digest: str
    options: Mapping[str, Any]
    rules: Rules
    keep_logits: bool = False
    boxes: BoxTable | None = None
    folder: str = ""

    def predictor(self) -> Predictor:
        """Load the predictor.

        Raises:
            L2R2Error: when it cannot be loaded, or the checkpoint has been changed since the work began.
        """
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(self.folder)
        predictor = Predictor.from_pretrained(self.run, **self.options).with_rules(self.rules)
        if predictor.checkpoint.digest != self.digest:
            raise L2R2Error(f"{self.run}: another checkpoint than at the start of this command; start it again with a new -o.")
        return predictor.keeping_logits() if self.keep_logits else predictor

    def decoding(self) -> Predictor:
        """Load a predictor that only decodes: without weights and without a localizer of its own."""
        options = {name: value for name, value in self.options.items() if name != "topk_prompts"}
        if options.get("localizer") is not None:
            options["localizer"] = "full"  # the cheapest; only its presence matters, since then images are decoded whole
        predictor = replace(self, options={**options, "device": "cpu", "precision": "fp32"}).predictor()
        predictor.model.to("meta")
        return predictor


class Source(NamedTuple):
    """An image of a partition: its content, its place, the message if it cannot be read, or None for the file of its name."""

    name: str
    data: bytes | str | Place | None
    entry: BoxEntry | None = None
    mask: Path | None = None

    def load(self, use: Callable[..., Item | Prediction]) -> Item | Prediction:
        """Return `use(name, entry, mask, content)`, or the failure of an image that cannot be read."""
        try:
            data = self.data.read() if isinstance(self.data, Place) else self.data
        except L2R2Error as error:
            data = str(error)
        if isinstance(data, str):
            return Prediction(self.name, (), data)
        return use(self.name, self.entry, self.mask, data)


def sources_of(partition: Partition, boxes: BoxTable | None) -> Iterator[Source]:
    """Yield the images of a partition; an image that two entries of the box file match cannot be used."""
    if partition.shard is None:
        for name, place in zip(partition.names, partition.places or [None] * len(partition.names)):
            yield Source(name, place, partition.entries.get(name), partition.masks.get(name))
        return
    for name, data in images_of_shard(*partition.shard):
        try:
            yield Source(name, data, boxes.find(name) if boxes is not None else None)
        except L2R2Error as error:
            yield Source(name, str(error))


class _Stage:
    """A stage; its predictor is loaded by the first call, whose errors Ray passes on, unlike those of a constructor."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def predictor(self) -> Predictor:
        """The predictor."""
        return self.plan.predictor()


class Predict(_Stage):
    """Read, decode, localize and classify the images of a partition in one worker."""

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[Row]:
        """Yield the rows of each partition."""
        for key, data in zip(batch["key"], batch["data"]):
            images = sources_of(pickle.loads(data), self.plan.boxes)
            ahead = self.predictor.network.most
            loaded = in_order(self._loaded, images, self.predictor.workers, ahead=ahead, weigh=pixels_of)
            slices = _sliced(self.predictor.predict_items(loaded), SLICE)
            yield from _numbered(key, (_rows_of(held, self.plan.keep_logits) for held in slices))

    def _loaded(self, image: Source) -> Item | Prediction:
        return image.load(self.predictor.load_file)


class Decode(_Stage):
    """Read and decode the images of a partition: what their views show, or all of it for a localizer."""

    @cached_property
    def predictor(self) -> Predictor:
        """The predictor, which only decodes."""
        return self.plan.decoding()

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[Row]:
        """Yield slices of decoded images."""
        for key, data in zip(batch["key"], batch["data"]):
            items = (image.load(self._decoded) for image in sources_of(pickle.loads(data), self.plan.boxes))
            slices = _sliced(items, self.predictor.batch_size, pixels_of)
            yield from _numbered(key, (pickle.dumps(held, pickle.HIGHEST_PROTOCOL) for held in slices))

    def _decoded(self, name: str, entry: BoxEntry | None, mask: Path | None, data: bytes | None) -> Item | Prediction:
        try:
            item = self.predictor.decode(name, entry, mask, data)
            return replace(item, rows=None)  # rows are windows of all boxes and masks, which would travel with each of them
        except L2R2Error as error:
            return Prediction(name, (), str(error))


class Classify(_Stage):
    """Localize and classify slices of decoded images."""

    def __call__(self, batch: Mapping[str, Any]) -> Row:
        """Return the rows of each slice."""
        rows = [data and self._rows(data) for data in batch["data"]]
        return {"key": list(batch["key"]), "slice": list(batch["slice"]), "data": rows}

    def _rows(self, data: bytes) -> bytes:
        return _rows_of(list(self.predictor.predict_items(pickle.loads(data))), self.plan.keep_logits)


def _rows_of(predictions: list[Prediction], keep: bool) -> bytes:
    return pickle.dumps(Rows.of([prediction.to_dict() for prediction in predictions], keep), pickle.HIGHEST_PROTOCOL)


def _numbered(key: str, slices: Iterable[bytes]) -> Iterator[Row]:
    """Yield the slices of a partition as rows, and the empty one that marks its end."""
    number = -1
    for number, data in enumerate(slices):
        yield {"key": [key], "slice": [number], "data": [data]}
    yield {"key": [key], "slice": [number + 1], "data": [b""]}


def _sliced(items: Iterable[Any], size: int, weigh: Callable[[Any], int] = lambda _: 0) -> Iterator[list[Any]]:
    """Yield lists of up to `size` items, shorter ones where they are heavy."""
    held: list[Any] = []
    weight = 0
    for item in items:
        held.append(item)
        weight += weigh(item)
        if len(held) >= size or weight >= HEAVY:
            yield held
            held, weight = [], 0
    if held:
        yield held

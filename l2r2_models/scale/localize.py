"""Localize any number of images on Ray Data, each exactly once, into a folder of Parquet partitions that is a box file."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..boxes import BoxEntry
from ..errors import L2R2Error
from ..images import load_image
from ..journal import digest_of
from ..localize import Localizer, LocalizerSpec, create_localizer
from ..localize.localize_files import localize_images
from .engine import Engine, Work
from .jobs import Progress, Report, fill
from .output import Output
from .partitions import SIZE
from .results import Rows
from .sources import find
from .stages import SLICE, Row, Source, numbered, sources_of


@dataclass(frozen=True)
class LocalizePlan:
    """How a worker localizes.

    Attributes:
        spec: the localizer.
        info: what the box file records about it.
        batch_size: images per call of the localizer.
        folder: working directory, to which names are relative.
    """

    spec: LocalizerSpec
    info: Mapping[str, Any]
    batch_size: int
    folder: str

    def localizer(self) -> Localizer:
        """Load the localizer.

        Raises:
            L2R2Error: when it cannot be loaded, or its weights have been changed since the work began.
        """
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(self.folder)
        localizer = create_localizer(self.spec)
        if localizer.info != self.info:
            raise L2R2Error(f"{self.spec}: other weights than at the start of this command; start it again with a new -o.")
        return localizer


class Localize:
    """Read, decode and localize the images of a partition in one worker."""

    def __init__(self, plan: LocalizePlan, threads: int = 0) -> None:
        self.plan, self.threads = plan, threads

    @cached_property
    def localizer(self) -> Localizer:
        """The localizer; loaded by the first call, whose errors Ray passes on, unlike those of a constructor."""
        return self.plan.localizer()

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[Row]:
        """Yield the rows of each partition."""
        for key, data in zip(batch["key"], batch["data"]):
            yield from numbered(key, map(partial(pickle.dumps, protocol=pickle.HIGHEST_PROTOCOL), self._slices(data)))

    def _slices(self, partition: bytes) -> Iterator[Rows]:
        stamps: dict[str, str] = {}

        def load(source: Source) -> tuple[str, Image.Image | str]:
            if source.data is None:  # a file on this machine, as in the file of one process
                stamps[source.name] = digest_of(source.name, self.localizer.about(source.name), None)
            try:
                content = source.read()
                return source.name, load_image(source.name if content is None else content, name=source.name)
            except L2R2Error as error:
                return source.name, str(error)

        images = sources_of(pickle.loads(partition), None)
        held: dict[str, BoxEntry] = {}
        for found in localize_images(self.localizer, images, load, self.plan.batch_size, workers=self.threads):
            held |= found
            if len(held) >= SLICE:
                yield Rows.of_boxes(held, stamps)
                held = {}
        if held:
            yield Rows.of_boxes(held, stamps)


def localize(
    sources: Sequence[str | Path],
    localizer: str | LocalizerSpec,
    out: str | Path,
    *,
    split: str | None = None,
    address: str | None = None,
    actors: int | None = None,
    batch_size: int = 8,
    partition_size: int = SIZE,
    progress: Progress = lambda items, _: items,
) -> Report:
    """Localize images on Ray Data and write the boxes to a folder of Parquet files, which `read_boxes` reads as one box file.

    The rows are those of `l2r2 localize -o boxes.parquet`. The same call continues after an interruption: finished partitions are
    kept, those of a lost worker or with a failure of the localizer are done again, and new or changed images change only the
    partitions that they are in.

    Args:
        sources: see `sources.find`.
        localizer: see `create_localizer`; every worker loads it.
        out: folder to write, as path or URL.
        split: use only this split of the data sets.
        address: Ray cluster to connect to, see `engine.connected`.
        actors: number of workers; by default one per GPU, or per core if the cluster has no GPU.
        batch_size: images per call of the localizer.
        partition_size: images per partition, on average.
        progress: wraps the partitions; takes their iterable and their number.

    Returns:
        A summary; in its tally, `found` and `whole` are the images with and without a box.

    Raises:
        L2R2Error: when Ray is missing, an option or an input is invalid, the folder was made with another localizer, is being
            written by another process, or cannot be written.

    >>> localize(["s3://traps/2026"], "camera-trap", "s3://traps/boxes")  # doctest: +SKIP
    """
    engine = Engine(address, actors)
    spec = LocalizerSpec.parse(localizer) if isinstance(localizer, str) else localizer
    finder = create_localizer(spec, device="cpu")
    finder.check_prompt()
    found = find(sources, None, split, given=False)
    output = Output(out, finder.info)
    if batch_size < 1:
        raise L2R2Error(f"batch_size must be at least 1, got {batch_size}.")
    plan = LocalizePlan(spec, finder.info, batch_size, os.getcwd())

    def results(work: Work) -> Iterator[Mapping[str, Any]]:
        return engine.run(work, plan, Localize)

    with output.writing():
        parts = list(found.partitions(finder, size=partition_size))
        return fill(output, parts, results, Rows.of_boxes({}, {}), progress)

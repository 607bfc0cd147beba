"""Localize many images into one box file, in batches, resumable at any time, on one or several processes.

Finished images are first written to a journal next to the file (`boxes.json.parts/`, see `journal`); at the end, the journal and
the previous contents of the file become the new file, in the order of the images. A killed run loses at most one batch, and the
result is the same as without an interruption.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..boxes import FORMATS, BoxEntry, BoxTable, read_boxes, write_boxes
from ..boxes.detections import Detections
from ..boxes.parquet import check_names, record_of
from ..boxes.read import entry_of
from ..errors import L2R2Error
from ..images import load_image
from ..journal import Journal, digest_of
from ..locks import only_writer
from ..pipe import in_order, worker_count
from .base import Localizer

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class CacheReport:
    """The contents of a box file after `localize_to_file`.

    Attributes:
        entries: entries of the requested images by name, in order.
        kept: number of those that the file already had.
    """

    entries: dict[str, BoxEntry]
    kept: int

    @property
    def failures(self) -> dict[str, str]:
        """Error messages by image name."""
        return {name: entry.failure for name, entry in self.entries.items() if entry.failure is not None}

    @property
    def with_box(self) -> int:
        """Number of images with at least one box."""
        return sum(bool(entry.boxes) for entry in self.entries.values())


def localize_to_file(
    localizer: Localizer,
    paths: Sequence[Path],
    out: Path,
    *,
    format: str = "megadetector",
    batch_size: int = 8,
    prompts: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress = lambda steps, _: steps,
) -> CacheReport:
    """Localize images into a box file; existing entries are kept, and failed images are tried again.

    Under torchrun each process takes every n-th image, and the first process writes the file when all are done.

    Args:
        localizer: see `create_localizer`.
        paths: image files.
        out: the box file, `.json` or `.parquet`.
        format: format of a JSON file, `megadetector` or `coco`.
        batch_size: images per call of the localizer.
        prompts: one prompt per path instead of the spec's; the file is then marked `oracle`.
        workers: number of threads that decode images in advance; 0 for none, by default one per core.
        progress: wraps the iteration over the batches.

    Returns:
        The entries of the images, and how many of them were in the file before.

    Raises:
        L2R2Error: when the file was made with other settings or cannot be written, the format is unknown, or a prompt is
            missing.
    """
    if prompts is None:
        localizer.check_prompt()
    out = Path(out)
    format = _format_of(out, format)
    names = [str(path) for path in paths]
    if format == "parquet":
        check_names(out, names)
    info = {**localizer.info, **({"oracle": True} if prompts is not None else {})}
    stamps = {name: digest_of(name, localizer.about(name), (prompts or {}).get(name)) for name in names}
    rank, world = _process()
    with _one_run(out, rank, world):
        journal = Journal(out, rank)
        before = _known(out, journal, info, stamps)
        kept = {name for name in names if _holds(before, name, stamps)}
        todo = [name for name in names[rank::world] if name not in kept]
        if world > 1:
            _wait_for_all()  # until every process has read the old state
        if todo:
            journal.start({"info": info})
        try:
            batches = localize_images(localizer, todo, _load, batch_size, prompts, worker_count(workers))
            for found in progress(batches, -(-len(todo) // batch_size)):
                for name, entry in found.items():
                    journal.add({**record_of(name, entry), "stamp": stamps[name]})
        finally:
            journal.close()
        if world > 1:
            _wait_for_all()
        if rank == 0:
            table = _known(out, journal, info, stamps)
            order = {**dict.fromkeys(names), **table.entries}  # entries of other images stay, at the end
            table.entries = {name: table.entries[name] for name in order}
            write_boxes(table, out, format)
            journal.remove()
        if world > 1:
            _wait_for_all()
        with _quiet():
            final = read_boxes(out).entries
    return CacheReport({name: final[name] for name in names}, len(kept))


@contextmanager
def _one_run(out: Path, rank: int, world: int) -> Iterator[None]:
    """Let the first process lock the file on behalf of all; if it cannot, the others exit too."""
    refused: L2R2Error | None = None
    with ExitStack() as held:
        try:
            if rank == 0:
                held.enter_context(only_writer(out))
        except L2R2Error as error:
            refused = error
        failed = [refused is not None]
        if world > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(failed, 0)
        if refused is not None:
            raise refused
        if failed[0]:
            raise SystemExit(1)
        yield


def _format_of(out: Path, format: str) -> str:
    """The format to write.

    Raises:
        L2R2Error: when the name or the format is unknown, or the format cannot store scores and failures.
    """
    suffix = out.suffix.lower()
    if suffix not in (".json", ".parquet"):
        raise L2R2Error(f"{out}: the name of a box file must end in .json or .parquet.")
    if format == "xyxy":
        raise L2R2Error("The format xyxy cannot store scores and failures; choose megadetector or coco.")
    if format not in (known := [name for name in FORMATS if name not in ("xyxy", "parquet")]):
        raise L2R2Error(f'Unknown box format "{format}" for a .json file; choose from {", ".join(known)}.')
    return "parquet" if suffix == ".parquet" else format


def _known(out: Path, journal: Journal, info: dict[str, Any], stamps: Mapping[str, str]) -> BoxTable:
    """Read the file and its journal; an entry that is still valid is never replaced.

    An image that is requested by another path than before (`data/a.png`, `/home/me/data/a.png`) gets the requested name.

    Args:
        stamps: stamps of the requested images as they are now.

    Raises:
        L2R2Error: when one of them was made with another localizer, or not by this function.
    """
    by_place = {os.path.abspath(name): name for name in stamps}
    table = BoxTable({}, info=info)
    for known, entry, stamp in _records(out, journal, info):
        name = known if known in stamps else by_place.get(os.path.abspath(known), known)
        if not _holds(table, name, stamps):
            table.entries[name] = entry
            table.stamps.pop(name, None)
            table.stamps.update({name: stamp} if stamp else {})
    return table


def _holds(table: BoxTable, name: str, stamps: Mapping[str, str]) -> bool:
    """Whether the table has a valid entry for an image as it is now."""
    entry = table.entries.get(name)
    return entry is not None and entry.failure is None and name in stamps and table.stamps.get(name) == stamps[name]


def _records(out: Path, journal: Journal, info: dict[str, Any]) -> Iterator[tuple[str, BoxEntry, str | None]]:
    """Name, entry and stamp of every entry in the file and the journal."""
    if out.exists():
        with _quiet():
            table = read_boxes(out)
        if table.info != info:
            raise L2R2Error(_other(out, table.info, info))
        for name, entry in table.entries.items():
            yield name, entry, table.stamps.get(name)
    for part in journal.parts():
        made_with = part.header.get("info") if isinstance(part.header, dict) else None
        if made_with != info:
            raise L2R2Error(_other(journal.folder, made_with if isinstance(made_with, dict) else {}, info))
        for _, record in part.records():
            try:
                yield record["file"], entry_of(record), record.get("stamp")
            except (L2R2Error, KeyError, TypeError, ValueError):  # damaged: localized again
                continue


def _other(place: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    what = "remove it or choose another -o."
    if "localizer" not in old:
        return f"{place}: already exists and was not made by `l2r2 localize`; choose another -o."
    if old["localizer"] != new["localizer"]:
        return f"{place}: was made with another localizer, {old['localizer']}; {what}"
    if bool(old.get("oracle")) != bool(new.get("oracle")):
        return f"{place}: was made {'with' if old.get('oracle') else 'without'} the true labels as prompts; {what}"
    return f"{place}: was made with other weights of {old['localizer']}; {what}"


def localize_images(
    localizer: Localizer,
    images: Iterable[T],
    load: Callable[[T], tuple[str, Image.Image | str]],
    batch_size: int,
    prompts: Mapping[str, str] | None = None,
    workers: int = 0,
) -> Iterator[dict[str, BoxEntry]]:
    """Yield the entries of each batch of images by name; the next images are decoded meanwhile.

    Args:
        localizer: finds the boxes.
        images: what `load` takes.
        load: returns the name of an image, and the image itself or the reason why it cannot be decoded; called in threads.
        batch_size: images per call of the localizer.
        prompts: prompts by name, instead of the spec's.
        workers: number of threads; 0 for none.
    """
    loaded = in_order(load, images, workers, ahead=batch_size, weigh=_pixels)
    while batch := dict(islice(loaded, batch_size)):
        decoded = {name: image for name, image in batch.items() if not isinstance(image, str)}
        entries = {name: BoxEntry(failure=why) for name, why in batch.items() if isinstance(why, str)}
        entries |= _entries(localizer, decoded, prompts)
        yield {name: entries[name] for name in batch}


def _pixels(loaded: tuple[str, Image.Image | str]) -> int:
    return 0 if isinstance(loaded[1], str) else loaded[1].width * loaded[1].height


def _load(name: str) -> tuple[str, Image.Image | str]:
    """The image, or the error message."""
    try:
        return name, load_image(name)
    except L2R2Error as error:
        return name, str(error)


def _entries(localizer: Localizer, images: Mapping[str, Image.Image], prompts: Mapping[str, str] | None) -> dict[str, BoxEntry]:
    """The entries of a batch; if it fails, each image is tried separately."""
    own_prompts = None if prompts is None else [prompts[name] for name in images]
    try:
        found = localizer(list(images.values()), names=list(images), prompts=own_prompts)
        return {name: _entry_of(detections) for name, detections in zip(images, found)}
    except (L2R2Error, RuntimeError, MemoryError) as error:  # RuntimeError: torch, e.g. out of GPU memory
        if len(images) == 1:
            return {name: BoxEntry(failure=" ".join(str(error).split())[:300]) for name in images}
    return {k: v for name, image in images.items() for k, v in _entries(localizer, {name: image}, prompts).items()}


def _entry_of(found: Detections) -> BoxEntry:
    if not (found.boxes.isfinite().all() and found.scores.isfinite().all()):
        return BoxEntry(failure="the boxes of the localizer are not finite; try dtype=float32.")
    return BoxEntry.from_detections(found)


def _process() -> tuple[int, int]:
    """Rank and number of processes from torchrun; with several, initialize the process group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # one shard may take days longer than another
    return rank, world


def _wait_for_all() -> None:
    import torch.distributed as dist

    dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings about every part of the file that is read."""
    logger = logging.getLogger("l2r2_models.boxes.read")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

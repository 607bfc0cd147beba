"""Import published benchmarks of background shift from their archives, as an imagefolder that `read_table` reads.

Nothing is downloaded: the user unpacks an archive and passes the folder. Each set's module cites the source of its layout.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ...errors import L2R2Error
from ...io import read_json, write_atomic, write_json, write_text
from .common import Item
from .counteranimal import read_counteranimal
from .cub import read_cub
from .eth80 import read_eth80
from .fod_a import read_fod_a
from .hard_imagenet import read_hard_imagenet
from .in9 import read_in9
from .iwildcam import read_iwildcam
from .metashift import read_metashift
from .spawrious import MANY_TO_MANY, ONE_TO_ONE, read_spawrious
from .urbancars import read_urbancars
from .waterbirds import read_waterbirds

ABOUT, METADATA = "import.json", "metadata.csv"
BOX = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class PublishedSet:
    """A published set.

    Attributes:
        read: reads the items of an unpacked archive.
        extra: what an optional second folder provides; "" if the set takes none.
    """

    read: Callable[..., list[Item]]
    extra: str = ""


SETS = {
    "waterbirds": PublishedSet(read_waterbirds, "CUB-200-2011, for boxes and masks"),
    "in9": PublishedSet(read_in9, "a training archive, such as in9l"),
    **{
        f"spawrious-{kind}-{level}": PublishedSet(partial(read_spawrious, f"{kind}-{level}"))
        for kind, levels in (("o2o", ONE_TO_ONE), ("m2m", MANY_TO_MANY))
        for level in levels
    },
    "counteranimal": PublishedSet(read_counteranimal),
    "metashift": PublishedSet(read_metashift),
    "urbancars": PublishedSet(read_urbancars),
    "hard-imagenet": PublishedSet(read_hard_imagenet, "ImageNet's images"),
    "cub": PublishedSet(read_cub),
    "iwildcam": PublishedSet(read_iwildcam),
    "fod-a": PublishedSet(read_fod_a),
    "eth80": PublishedSet(read_eth80),
}


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        folder: the imagefolder.
        splits: number of images per split.
        linked: number of files that this call linked.
        copied: number of files that this call copied.
    """

    folder: Path
    splits: dict[str, int]
    linked: int
    copied: int


def import_published(
    name: str,
    folder: str | Path,
    out: str | Path,
    *,
    extra: str | Path | None = None,
    copy: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda steps, _: steps,
) -> Imported:
    """Write a published set as an imagefolder with images/, masks/ (if any) and metadata.csv; an interrupted call is resumed.

    Images are hard links to the user's files, or copies if the file system does not support links. Masks that are not a white
    object on black are converted.

    Args:
        name: one of `SETS`.
        folder: the unpacked archive.
        out: a new folder, or that of an interrupted call.
        extra: a second folder, see `PublishedSet.extra`.
        copy: whether to copy the images, so that the two folders are independent.
        progress: wraps the images while they are written.

    Returns:
        The folder and what was written.

    Raises:
        L2R2Error: when the set is unknown, the folder has another layout, files are missing, or `out` contains something else.

    >>> sorted(SETS)[:3]
    ['counteranimal', 'cub', 'eth80']
    """
    if name not in SETS:
        raise L2R2Error(f'Unknown set "{name}"; choose from {", ".join(SETS)}.')
    if extra is not None and not SETS[name].extra:
        raise L2R2Error(f"{name} takes no second folder; do not pass --with.")
    items = SETS[name].read(Path(folder), *([] if extra is None else [Path(extra)]))
    _check_files(items, Path(folder))
    out = Path(out)
    lines = _metadata(items)
    about = {"set": name, "images": len(items), "sha256": _digest(items, lines)}
    _check_out(out, about)
    done: Counter[str] = Counter()
    if not (out / METADATA).is_file():
        write_json(out / ABOUT, about)
        for item in progress(items, len(items)):
            done.update([_place(item.image, out / "images" / item.name, copy), _place_mask(item, out, copy)])
        write_text(out / METADATA, lines)  # written last, so it marks the data set as complete
    return Imported(out, dict(Counter(item.columns["split"] for item in items)), done["linked"], done["copied"])


def _check_files(items: list[Item], folder: Path) -> None:
    missing = [path for item in items for path in (item.image, item.mask) if path is not None and not path.is_file()]
    if missing:
        raise L2R2Error(f"{folder}: {len(missing)} files are missing, the first is {missing[0]}; unpack the whole archive.")


def _metadata(items: list[Item]) -> str:
    names = list(dict.fromkeys(name for item in items for name in item.columns))
    names += BOX if any(item.box for item in items) else ()
    names += ["mask_file"] if any(item.mask for item in items) else []
    lines = io.StringIO()
    writer = csv.DictWriter(lines, ["file_name", *names], restval="", lineterminator="\n")
    writer.writeheader()
    for item in items:
        box = dict(zip(BOX, (f"{v:g}" for v in item.box))) if item.box else {}
        mask = {"mask_file": _mask_name(item)} if item.mask else {}
        writer.writerow({"file_name": f"images/{item.name}", **item.columns, **box, **mask})
    return lines.getvalue()


def _mask_name(item: Item) -> str:
    return f"masks/{PurePosixPath(item.name).with_suffix('.png')}"


def _digest(items: list[Item], lines: str) -> str:
    """SHA-256 over the metadata and all file sizes, which identifies a set and its version."""
    digest = hashlib.sha256(lines.encode("utf-8", errors="backslashreplace"))
    for item in items:
        digest.update(repr([path.stat().st_size for path in (item.image, item.mask) if path is not None]).encode())
    return digest.hexdigest()


def _check_out(out: Path, about: dict[str, Any]) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / ABOUT).is_file():
        raise L2R2Error(f"{out}: already exists and is not an imported set; choose another -o.")
    if read_json(out / ABOUT) != about:
        raise L2R2Error(f"{out}: contains another imported set, or one made from other files; choose another -o.")


def _place(source: Path, target: Path, copy: bool) -> str:
    """Link or copy a file atomically, so that an existing target is complete."""
    if target.is_file():
        return "kept"
    if not copy:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(os.path.realpath(source), target)
            return "linked"
        except OSError:  # another disk, or links are not supported or not permitted
            pass
    write_atomic(target, partial(shutil.copyfile, source))
    return "copied"


def _place_mask(item: Item, out: Path, copy: bool) -> str:
    if item.mask is None:
        return "none"
    target = out / _mask_name(item)
    if item.read_mask is None:
        return _place(item.mask, target, copy)
    if not target.is_file():
        pixels = Image.fromarray(item.read_mask(item.mask).astype(np.uint8) * 255)
        write_atomic(target, partial(pixels.save, format="PNG"))
    return "written"

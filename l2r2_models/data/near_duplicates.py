"""Near-duplicates across splits: neighboring frames, copies and repeated crops. They make metrics too optimistic."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import L2R2Error
from ..images import load_image
from .table import ImageTable, Row

SIDE, LOW = 64, 16  # side of the shrunk image in pixels; number of frequencies kept per direction
# Of 256 bits; independent images differ in about 128 (standard deviation 8). Measured: on fod_a_shift (video frames), 42 of 360
# test_id images are this close to a training image of their class, all with the same object on the same ground, and none of the
# 1,079 test_ood images. On ETH-80, 63 of 504 are, with another pear or apple in the same pose: a warning, not a proof.
ALIKE = 60
HELD_OUT = "held-out"  # validation rows that `hold_out` took from the training rows
MAX_COMPARED = 2000  # images per split other than train and val; more would slow down every start, because all are decoded


@dataclass(frozen=True)
class Leak:
    """The images of a split that are near-duplicates of training images.

    Attributes:
        split: the split's name, or `HELD_OUT`.
        images: number of images compared.
        alike: number of them within `ALIKE` bits of a training image with the same label.
        example: the most similar pair, the split's image first, as paths relative to the data set.
    """

    split: str
    images: int
    alike: int
    example: tuple[str, str]

    def sentence(self, group: str | None = None, take: str = "random") -> str:
        """Return the warning as a sentence, with advice.

        Args:
            group, take: how the held-out rows were chosen, see `hold_out`; the advice is another way.
        """
        if self.split != HELD_OUT:
            advice = "put all images of one take, site or object into the same split"
        elif group is not None:
            advice = f"images that look alike have different values of {group}; hold out by a column of takes, sites or objects"
        elif take == "end":
            advice = "hold whole groups out (--val-group), because takes reach into the end of a class"
        else:
            advice = "hold whole groups out (--val-group), or the end of each class (--val-from end)"
        return (
            f"{self.alike} of {self.images} {self.split} images look like training images of their class (e.g. {self.example[0]} "
            f"~ {self.example[1]}); metrics on {self.split} may be too optimistic: {advice}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "example": list(self.example)}


def perceptual_hash(image: Image.Image) -> bytes:
    """Hash an image to 256 bits that hardly change with size, compression or small shifts.

    The bits tell which of the 16x16 lowest frequencies of the gray image at 64x64 are above their median. (pHash uses 8x8, but 64
    bits did not distinguish two stretches of concrete.)

    Returns:
        32 bytes.

    >>> perceptual_hash(Image.new("RGB", (40, 30))) == perceptual_hash(Image.new("RGB", (80, 60)))
    True
    """
    gray = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    waves = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(LOW)[:, None] / (2 * SIDE))
    spectrum = np.rint(waves @ gray @ waves.T)  # without rounding, a flat image would be hashed by its numerical errors
    return np.packbits(spectrum > np.median(spectrum)).tobytes()


def find_leaks(
    train: ImageTable,
    others: Mapping[str, ImageTable],
    hashes: Mapping[Path, bytes] | None = None,
    progress: Callable[[Iterable[None], int], Iterable[None]] = lambda steps, _: steps,
) -> list[Leak]:
    """Compare the images of other splits with the training images of the same class (with all of them if they have no label).

    Args:
        train: the training rows.
        others: rows by split; for a large split, `MAX_COMPARED` evenly spaced images are compared.
        hashes: known hashes (from `check_images`); other images are decoded. Unreadable images are skipped.
        progress: wraps the steps while images are decoded.

    Returns:
        One `Leak` per split with near-duplicates.
    """
    paths = {name: _some(dict.fromkeys(row.path for row in table.rows)) for name, table in others.items()}
    known = dict(hashes or {})
    todo = [
        p for p in dict.fromkeys([*(r.path for r in train.rows), *(p for ps in paths.values() for p in ps)]) if p not in known
    ]
    with ThreadPoolExecutor(2) as pool:

        def add(path: Path) -> None:
            with contextlib.suppress(L2R2Error):
                known[path] = perceptual_hash(load_image(path))

        for _ in progress(pool.map(add, todo), len(todo)):
            pass
    labels = _labels([*train.rows, *(row for table in others.values() for row in table.rows)])
    base = [path for path in dict.fromkeys(row.path for row in train.rows) if path in known]
    found: list[Leak] = []
    for name, candidates in paths.items() if base else ():
        usable = [path for path in candidates if path in known]
        nearest, distance = _nearest(usable, base, known, labels)
        if alike := int((distance <= ALIKE).sum()):
            best = int(distance.argmin())
            pair = (usable[best], base[nearest[best]])
            found.append(Leak(name, len(usable), alike, (_name(pair[0], train), _name(pair[1], train))))
    return found


def _labels(rows: Iterable[Row]) -> dict[Path, str | None]:
    """Return the label of each image; None if it has no label, or objects with different labels."""
    labels: dict[Path, str | None] = {}
    for row in rows:
        labels[row.path] = row.label if labels.get(row.path, row.label) == row.label else None
    return labels


def _some(paths: Iterable[Path]) -> list[Path]:
    paths = list(paths)
    return paths if len(paths) <= MAX_COMPARED else [paths[i * len(paths) // MAX_COMPARED] for i in range(MAX_COMPARED)]


def _name(path: Path, table: ImageTable) -> str:
    return Path(os.path.relpath(path, table.root)).as_posix()


def _nearest(
    images: list[Path], base: list[Path], hashes: Mapping[Path, bytes], labels: Mapping[Path, str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each image the nearest one of `base` that can have the same class, and the number of differing bits."""
    index, distance = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    codes = {label: i for i, label in enumerate(dict.fromkeys(labels.values()))}
    ours, theirs = (np.array([codes[labels[path]] for path in paths]) for paths in (images, base))
    bits, nameless = _bits(hashes[path] for path in base), codes.get(None, -1)
    for start in range(0, len(images), 512):
        part = slice(start, start + 512)
        apart = (bits.shape[1] - _bits(hashes[path] for path in images[part]) @ bits.T) / 2
        differ = (ours[part, None] != theirs) & (ours[part, None] != nameless) & (theirs != nameless)
        apart[differ] = np.inf
        index.append(apart.argmin(1))
        distance.append(apart.min(1))
    return np.concatenate(index), np.concatenate(distance)


def _bits(hashes: Iterable[bytes]) -> np.ndarray:
    """Hashes as `[N, 256]` float32 of -1 and 1, so that the product of two rows is 256 - 2 * the number of differing bits."""
    return np.unpackbits(np.array([np.frombuffer(h, dtype=np.uint8) for h in hashes]), axis=1).astype(np.float32) * 2 - 1

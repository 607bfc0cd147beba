"""The contents of a box file, and the join of its entries to images by path."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error
from .detections import Detections
from .rle import Rle

ANY = ".*"  # suffix of an entry whose file does not give the image's
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BoxEntry:
    """The entry of one image in a box file.

    Attributes:
        boxes: xyxy in pixels, or in [0, 1] if `normalized`.
        scores: one per box; 1 if the file has none.
        labels: one per box; "" if the file has none.
        normalized: whether boxes are relative to the image size.
        image_size: `(height, width)`, or None if the file does not give it.
        failure: why the localizer failed on this image, or None.
        masks: one per box (None for a box without a mask), or empty.

    >>> BoxEntry(((0.0, 0.0, 0.5, 1.0),), (1.0,), ("",), normalized=True).detections((10, 20), "a.jpg").boxes
    tensor([[ 0.,  0., 10., 10.]])
    """

    boxes: tuple[Box, ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    normalized: bool = False
    image_size: tuple[int, int] | None = None
    failure: str | None = None
    masks: tuple[Rle | None, ...] = ()

    @classmethod
    def from_detections(cls, found: Detections) -> BoxEntry:
        """Create an entry from detections; boxes are rounded to 0.001 pixels and scores to four digits, as in all formats."""
        boxes = [tuple(round(v, 3) for v in box) for box in found.boxes.tolist()]
        masks = () if found.masks is None else tuple(Rle.encode(mask) for mask in found.masks)
        scores = tuple(round(s, 4) for s in found.scores.tolist())
        return cls(tuple(boxes), scores, found.labels, False, found.image_size, None, masks)

    def detections(self, image_size: tuple[int, int], name: str) -> Detections:
        """Convert the entry to detections in pixels, not clipped, best first.

        Args:
            image_size: `(height, width)` of the image.
            name: the image's name, for messages.

        Raises:
            L2R2Error: when the entry, or a mask in it, was made for an image of another size.
        """
        if self.image_size is not None and tuple(self.image_size) != tuple(image_size):
            (h, w), (height, width) = self.image_size, image_size
            hint = (
                "; were the boxes made without EXIF orientation?"
                if (h, w) == (width, height)
                else "; use boxes made for this file."
            )
            raise L2R2Error(f"{name}: the box file was made for a {w}x{h} image, but this one is {width}x{height}{hint}")
        height, width = image_size if self.normalized else (1, 1)
        pixels = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in self.boxes]
        found = Detections.from_lists(pixels, image_size, self.scores, self.labels, sort=False)
        return replace(found, masks=self._masks(found, name)).sorted()

    def _masks(self, found: Detections, name: str) -> Tensor | None:
        """`[N, H, W]` bool, or None without masks; a box without a mask becomes its own mask if other boxes have one."""
        if not any(self.masks):
            return None
        if wrong := next((mask for mask in self.masks if mask is not None and mask.size != found.image_size), None):
            (h, w), (height, width) = wrong.size, found.image_size
            raise L2R2Error(
                f"{name}: a mask of the box file is {w}x{h}, but the image is {width}x{height}; use boxes made for this file."
            )
        masks = torch.zeros(len(found), *found.image_size, dtype=torch.bool)
        windows, _ = found.windows()
        for out, mask, (x0, y0, x1, y1) in zip(masks, self.masks, windows.tolist()):
            if mask is None:
                out[y0:y1, x0:x1] = True
            else:
                out.copy_(mask.decode())
        return masks


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        video: path of the video, as written in the box file.
        number: number of the frame, from 0.
        rate: frames per second of the video.
    """

    video: str
    number: int
    rate: float


@dataclass
class BoxTable:
    """The entries of a box file by image path.

    Attributes:
        entries: by path, as written in the file; a name that ends in `.*` is that of an image with any suffix.
        source: the file's name, for messages.
        format: the file's format, for messages.
        info: for files of `l2r2 localize`, how the boxes were made: `localizer` (its spec), `weights` (a digest of its network,
            or None), `oracle` (whether each image's true label was the prompt).
        stamps: by path, a digest of the image file and settings that `l2r2 localize` made the entry from.
        detector: name of the detector that found the boxes; empty if the file does not give it.
        categories: ids of the box labels, for MegaDetector files.
        frames: by path, the frames of videos, for MegaDetector files.

    >>> table = BoxTable({"photos/a.jpg": BoxEntry(((0, 0, 4, 4),), (1.0,), ("",))})
    >>> table.find("a.jpg").boxes
    ((0, 0, 4, 4),)
    """

    entries: dict[str, BoxEntry]
    source: str = ""
    format: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict, repr=False)
    detector: str = ""
    categories: dict[str, str] = field(default_factory=dict)
    frames: dict[str, Frame] = field(default_factory=dict, repr=False)
    _by_name: dict[str, list[tuple[tuple[str, ...], str]]] = field(default_factory=dict, repr=False)  # (parts of the path, path)

    def __post_init__(self) -> None:
        for key in self.entries:
            self._by_name.setdefault((parts := _parts(key))[-1], []).append((parts, key))

    def find(self, path: str | Path) -> BoxEntry | None:
        """Find the entry of an image: the same path, or else the only entry where one path ends with the other.

        Raises:
            L2R2Error: when several entries match.
        """
        key = self.key_of(str(path))
        return None if key is None else self.entries[key]

    def key_of(self, path: str) -> str | None:
        """Return the path of an image as the file writes it; None if it does not list the image.

        Raises:
            L2R2Error: when several entries match.
        """
        if path in self.entries:
            return path
        wanted = _parts(path)
        named = self._by_name.get(wanted[-1]) or self._by_name.get(f"{PurePosixPath(wanted[-1]).stem}{ANY}", [])
        wanted = (*wanted[:-1], named[0][0][-1]) if named else wanted
        same = [key for parts, key in named if parts == wanted]
        fits = same if len(same) == 1 else [key for parts, key in named if _ends_alike(parts, wanted)]
        if len(fits) > 1:
            raise L2R2Error(
                f"{self.source}: {len(fits)} entries match {path} ({fits[0]}, {fits[1]}, ...); use longer paths in it."
            )
        return fits[0] if fits else None

    def join(self, paths: Iterable[str | Path]) -> dict[str, BoxEntry]:
        """Entries by image path, for the images that have one.

        Raises:
            L2R2Error: when no image has an entry, or two images match the same one (bare file names for several folders).
        """
        return {path: self.entries[key] for path, key in self.keys_of(paths).items()}

    def keys_of(self, paths: Iterable[str | Path]) -> dict[str, str]:
        """Paths as the file writes them by image path, for the images that it lists; it raises what `join` does."""
        keys: dict[str, str] = {}
        used: dict[str, str] = {}
        for path in map(str, paths):
            if (key := self.key_of(path)) is None:
                continue
            if (other := used.setdefault(key, path)) != path:
                raise L2R2Error(f"{self.source}: one entry matches both {other} and {path}; use longer paths in it.")
            keys[path] = key
        if not keys:
            raise L2R2Error(f"{self.source}: none of its {len(self.entries)} entries matches an image; compare the paths in it.")
        return keys


def _parts(path: str) -> tuple[str, ...]:
    # macOS stores accents as separate characters (NFD), other systems do not
    return PurePosixPath(unicodedata.normalize("NFC", path.replace("\\", "/"))).parts or ("",)


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    shorter = min(len(a), len(b))
    return a[-shorter:] == b[-shorter:]

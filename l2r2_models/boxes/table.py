"""What box files say of images, and how it is joined to them: by path."""

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

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BoxEntry:
    """What a box file says of one image.

    Attributes:
        boxes: xyxy, in pixels, or in [0, 1] where `normalized`.
        scores: one a box; 1 where the file has none.
        labels: one a box; "" where the file has none.
        normalized: boxes are relative to the image size.
        image_size: `(height, width)` where the file gives it.
        failure: why the localizer failed on this image, or None.
        masks: one a box (None: that box has none), or empty.
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
        """What a localizer found, in pixels; boxes to a thousandth of one, scores to four digits, as every format stores them."""
        boxes = [tuple(round(v, 3) for v in box) for box in found.boxes.tolist()]
        masks = () if found.masks is None else tuple(Rle.encode(mask) for mask in found.masks)
        scores = tuple(round(s, 4) for s in found.scores.tolist())
        return cls(tuple(boxes), scores, found.labels, False, found.image_size, None, masks)  # type: ignore[arg-type]

    def detections(self, image_size: tuple[int, int], name: str) -> Detections:
        """As pixels of an image of `(height, width)`, unclipped, best first.

        Raises:
            L2R2Error: the file, or a mask in it, was made for an image of another size.
        """
        if self.image_size is not None and tuple(self.image_size) != tuple(image_size):
            (h, w), (height, width) = self.image_size, image_size
            hint = "; were the boxes made without EXIF orientation?" if (h, w) == (width, height) else "."
            raise L2R2Error(f"{name}: the box file was made for a {w}x{h} image, this one is {width}x{height}{hint}")
        height, width = image_size if self.normalized else (1, 1)
        pixels = [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in self.boxes]
        found = Detections.from_lists(pixels, image_size, self.scores, self.labels, sort=False)
        return replace(found, masks=self._masks(found, name)).sorted()

    def _masks(self, found: Detections, name: str) -> Tensor | None:
        """`[N, H, W]` bool; a box without a mask among others with one is its own mask."""
        if not any(self.masks):
            return None
        if wrong := next((mask for mask in self.masks if mask is not None and mask.size != found.image_size), None):
            (h, w), (height, width) = wrong.size, found.image_size
            raise L2R2Error(f"{name}: a mask of the box file is {w}x{h}, the image {width}x{height}.")
        masks = torch.zeros(len(found), *found.image_size, dtype=torch.bool)
        windows, _ = found.windows()
        for out, mask, (x0, y0, x1, y1) in zip(masks, self.masks, windows.tolist()):
            if mask is None:
                out[y0:y1, x0:x1] = True
            else:
                out.copy_(mask.decode())
        return masks


@dataclass
class BoxTable:
    """Box entries by the path that the file gives them.

    Attributes:
        entries: by path.
        source, format: for messages.
        info: what made the boxes, where `l2r2 localize` did: `localizer` (its spec), `weights` (a digest of its network, or
            None), `oracle` (whether each image's true label was its prompt).
        stamps: by path, a digest of what `l2r2 localize` made the entry from: the image file and what belongs to it.
    """

    entries: dict[str, BoxEntry]
    source: str = ""
    format: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict, repr=False)
    _by_name: dict[str, list[tuple[tuple[str, ...], str]]] = field(default_factory=dict, repr=False)  # parts of a path, the path

    def __post_init__(self) -> None:
        for key in self.entries:
            self._by_name.setdefault((parts := _parts(key))[-1], []).append((parts, key))

    def find(self, path: str | Path) -> BoxEntry | None:
        """The entry of an image: the same path, or the only one of which one path is the end of the other.

        Raises:
            L2R2Error: several entries fit.
        """
        key = self._key(str(path))
        return None if key is None else self.entries[key]

    def _key(self, path: str) -> str | None:
        if path in self.entries:
            return path
        wanted = _parts(path)
        named = self._by_name.get(wanted[-1], ())
        same = [key for parts, key in named if parts == wanted]
        fits = same if len(same) == 1 else [key for parts, key in named if _ends_alike(parts, wanted)]
        if len(fits) > 1:
            raise L2R2Error(f"{self.source}: {len(fits)} entries fit {path} ({fits[0]}, {fits[1]}, ...); use longer paths in it.")
        return fits[0] if fits else None

    def join(self, paths: Iterable[str | Path]) -> dict[str, BoxEntry]:
        """Entries by image path, for the images that have one.

        Raises:
            L2R2Error: no image has an entry, or two images would share one (a file of bare names for several folders).
        """
        joined: dict[str, BoxEntry] = {}
        used: dict[str, str] = {}
        for path in map(str, paths):
            if (key := self._key(path)) is None:
                continue
            if (other := used.setdefault(key, path)) != path:
                raise L2R2Error(f"{self.source}: one entry fits both {other} and {path}; use longer paths in it.")
            joined[path] = self.entries[key]
        if not joined:
            raise L2R2Error(f"{self.source}: none of its {len(self.entries)} entries belongs to one of the images.")
        return joined


def _parts(path: str) -> tuple[str, ...]:
    # macOS writes accents as characters of their own (NFD), other systems do not
    return PurePosixPath(unicodedata.normalize("NFC", path.replace("\\", "/"))).parts or ("",)


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    shorter = min(len(a), len(b))
    return a[-shorter:] == b[-shorter:]

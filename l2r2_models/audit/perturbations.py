"""What the audit does to an image: noise, erasing, other backgrounds; on original pixels, before any cut.

A view is cut from the changed image by `make_views`, as from any other image.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..data.composite import background_of, object_windows, paste_object

STD_LEVELS = (30, 60, 90, 120, 150, 180, 210)  # of 255 (METHOD.md 9)
L2_LEVELS = (19, 37, 56, 75, 94, 112, 131)  # of 255, as a root mean square over the whole image; RIVAL10 goes up to 131
SWAPS = ("mixed_same", "mixed_next")
CHALLENGE = "challenge"


@dataclass(frozen=True)
class Subject:
    """One image with its objects.

    Attributes:
        key: its name, from which its noise and its backgrounds are drawn.
        pixels: uint8 `[H, W, 3]`.
        boxes: `[N, 4]` xyxy of every object, the best first.
        mask: `[H, W]` bool of all objects, or None.
        view_mask: `[H, W]` bool of the best object, by which views are cut, or None.
    """

    key: str
    pixels: Tensor
    boxes: Tensor
    mask: Tensor | None
    view_mask: Tensor | None

    @cached_property
    def inside(self) -> Tensor:
        """`[H, W]` bool, True on the objects: the mask, or where there is none the boxes."""
        return self.in_boxes if self.mask is None else self.mask

    @cached_property
    def in_boxes(self) -> Tensor:
        """`[H, W]` bool, True in a box; no part of a mask is left out, that of a single object lies in one rectangle."""
        mask = self.mask if len(self.boxes) == 1 else None
        inside = torch.zeros(self.pixels.shape[:2], dtype=torch.bool)
        for x0, y0, x1, y1 in object_windows(self.pixels.shape[:2], self.boxes, mask):
            inside[y0:y1, x0:x1] = True
        return inside if self.mask is None else inside | self.mask

    @cached_property
    def background(self) -> Tensor:
        """uint8 `[H, W, 3]` without any of the objects."""
        return background_of(self.pixels, self.boxes, self.mask)


def plan(backgrounds: int, challenge: bool = False) -> list[str]:
    """Names of all interventions.

    - `original`;
    - `fg_only`: the background is the model's mean color; `bg_only_mask`, `bg_only_box`: the object is (bg view kinds `shape`
      and `box`; the same images are Hard ImageNet's ablations gray by mask and gray by box); `tiled`: the object's box is filled
      from its surroundings;
    - `noise_fg_30`, `noise_bg_30`, ...: Gaussian noise of that standard deviation (of 255) on the object, or on the rest, then
      clamped (RIVAL10); `noise_l2_fg_10`, ...: the noise has the same L2 norm on the object as on the rest, level * sqrt(3 H W)
      before clamping, so that a small object gets as much of it as a large background [R];
    - `mixed_same`, `mixed_next`, `mixed_rand_0`, ...: the object on the object-free background of another image of its class, of
      the next class, of a random class (IN-9, Xiao et al. 2020);
    - `challenge`, where asked for: the object on the background of every other image, right only if all of them are.
    """
    noise = [f"noise_{w}_{level}" for level in STD_LEVELS for w in ("fg", "bg")]
    l2 = [f"noise_l2_{w}_{level}" for level in L2_LEVELS for w in ("fg", "bg")]
    swaps = [*SWAPS, *(f"mixed_rand_{i}" for i in range(backgrounds))]
    swaps += [CHALLENGE] if challenge else []
    return ["original", "fg_only", "bg_only_mask", "bg_only_box", "tiled", *noise, *l2, *swaps]


def intervene(name: str, subject: Subject, fill: Sequence[int], noise: Tensor) -> Tensor | None:
    """One changed image.

    Args:
        name: see `plan`, but for the swaps.
        subject: the image.
        fill: color of what is erased.
        noise: see `noise_pattern`.

    Returns:
        uint8 `[H, W, 3]`; None for `bg_only_mask` of an image without a mask.
    """
    if name == "original":
        return subject.pixels
    if name == "tiled":
        return subject.background
    if name.startswith("noise_"):
        *_, where, level = name.split("_")
        inside = subject.inside if where == "fg" else ~subject.inside
        return add_noise(subject.pixels, inside, noise, float(level) / 255, l2="_l2_" in name)
    if name == "bg_only_mask" and subject.mask is None:
        return None
    erased = {"fg_only": ~subject.inside, "bg_only_mask": subject.inside, "bg_only_box": subject.in_boxes}[name]
    return torch.where(erased[..., None], torch.tensor(fill, dtype=torch.uint8), subject.pixels)


def noise_pattern(subject: Subject, grain: int, seed: int) -> Tensor:
    """The noise of an image, one pattern whatever its level and place: `[H, W, 3]` of mean 0 and standard deviation 1.

    Args:
        grain: side of the model's view: the noise has one value a pixel of the whole image at that size (at most one a pixel), so
            that its effect hardly hangs on how many pixels the file has [R].
        seed: same seed and key, same pattern.
    """
    height, width = subject.pixels.shape[:2]
    scale = min(1.0, grain / max(height, width))
    rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
    noise = torch.randn(rows, columns, 3, generator=torch.Generator().manual_seed(number_of(seed, subject.key, "noise")))
    return noise[torch.arange(height) * rows // height][:, torch.arange(width) * columns // width]


def add_noise(pixels: Tensor, inside: Tensor, noise: Tensor, level: float, *, l2: bool = False) -> Tensor:
    """Noise `[H, W, 3]` on the pixels where `inside` `[H, W]` is True: uint8 `[H, W, 3]`.

    Args:
        level: standard deviation on [0, 1] pixels; with `l2` the noise's root mean square over the whole image.
    """
    noise = noise * inside[..., None]
    if l2:
        noise = noise * noise.numel() ** 0.5 / noise.norm().clamp(min=1e-12)
    return ((pixels / 255 + level * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def swap(subject: Subject, background: Tensor) -> Tensor:
    """The best object of an image on the object-free background `[h, w, 3]` of another: uint8 `[H, W, 3]`."""
    return paste_object(subject.pixels, subject.boxes[0], subject.mask, background)


class Donors:
    """Which image lends its background to which.

    Args:
        keys: names of the rows.
        labels: their classes.
        backgrounds: random backgrounds a row.
        seed: same seed and rows, same draws.
        images: of each row its image, where several rows show one; none of them lends to another.
    """

    def __init__(
        self, keys: Sequence[str], labels: Sequence[str], backgrounds: int, seed: int, images: Sequence[int] | None = None
    ) -> None:
        self.keys, self.labels, self.backgrounds, self.seed = keys, labels, backgrounds, seed
        self.images = range(len(keys)) if images is None else images
        self.count = len(set(self.images))
        self.classes = sorted(set(labels))
        self.members = {c: [i for i, label in enumerate(labels) if label == c] for c in self.classes}

    def of(self, row: int) -> dict[str, int]:
        """Row numbers by intervention (see `plan`), those only that there are."""
        rng = random.Random(number_of(self.seed, self.keys[row], "backgrounds"))
        found = {}
        own = self.images[row]
        if same := [i for i in self.members[self.labels[row]] if self.images[i] != own]:
            found["mixed_same"] = rng.choice(same)
        if len(self.classes) > 1:
            after = self.classes[(self.classes.index(self.labels[row]) + 1) % len(self.classes)]
            if others := [i for i in self.members[after] if self.images[i] != own]:
                found["mixed_next"] = rng.choice(others)
        drawn: list[int] = []
        seen = {own}
        most = min(self.backgrounds, self.count - 1) if len(self.classes) > 1 else 0
        while len(drawn) < most:  # a class first, so that large ones do not dominate
            other = rng.choice(self.members[rng.choice(self.classes)])
            if self.images[other] not in seen:
                seen.add(self.images[other])
                drawn.append(other)
        return {**found, **{f"mixed_rand_{i}": other for i, other in enumerate(drawn)}}

    def others(self, row: int) -> list[int]:
        """A row of every other image, in an order of its own: those of all test backgrounds."""
        first = {image: i for i, image in reversed(list(enumerate(self.images)))}
        rows = sorted(i for image, i in first.items() if image != self.images[row])
        random.Random(number_of(self.seed, self.keys[row], CHALLENGE)).shuffle(rows)
        return rows


def number_of(seed: int, *parts: str) -> int:
    """A 63-bit number drawn from a seed and names, the same on every machine."""
    text = "\0".join((str(seed), *parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1

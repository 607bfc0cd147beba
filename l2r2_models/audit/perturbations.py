"""Interventions of the audit on original pixels: noise, erasing, and other backgrounds.

Views are cut from the changed image by `make_views`, as from any other image.
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

STD_LEVELS = (30, 60, 90, 120, 150, 180, 210)  # of 255, see docs/method.md, section 9
L2_LEVELS = (19, 37, 56, 75, 94, 112, 131)  # of 255, as a root mean square over the whole image; RIVAL10 goes up to 131
SWAPS = ("mixed_same", "mixed_next")
CHALLENGE = "challenge"


@dataclass(frozen=True)
class Subject:
    """One image with its objects.

    Attributes:
        key: unique name, from which its noise and backgrounds are seeded.
        pixels: uint8 `[H, W, 3]`.
        boxes: `[N, 4]` xyxy pixels of every object, best first.
        mask: `[H, W]` bool of all objects, or None.
        view_mask: `[H, W]` bool of the best object, used to cut the views, or None.
    """

    key: str
    pixels: Tensor
    boxes: Tensor
    mask: Tensor | None
    view_mask: Tensor | None

    @cached_property
    def inside(self) -> Tensor:
        """Mask `[H, W]` bool of all objects; without a mask, of their boxes."""
        return self.in_boxes if self.mask is None else self.mask

    @cached_property
    def in_boxes(self) -> Tensor:
        """`[H, W]` bool, True inside a box; a single box is grown to contain the mask."""
        mask = self.mask if len(self.boxes) == 1 else None
        inside = torch.zeros(self.pixels.shape[:2], dtype=torch.bool)
        for x0, y0, x1, y1 in object_windows(self.pixels.shape[:2], self.boxes, mask):
            inside[y0:y1, x0:x1] = True
        return inside if self.mask is None else inside | self.mask

    @cached_property
    def background(self) -> Tensor:
        """The image, uint8 `[H, W, 3]`, with all objects removed."""
        return background_of(self.pixels, self.boxes, self.mask)


def plan(backgrounds: int, challenge: bool = False) -> list[str]:
    """List the names of all interventions.

    Args:
        backgrounds: number of random backgrounds per image.
        challenge: whether to add `challenge`.

    - `original`: the unchanged image.
    - `fg_only`: the background is replaced by the model's mean color.
    - `bg_only_mask`, `bg_only_box`: the object's mask, or its box, is replaced instead (as in the bg views `shape` and `box`, and
      Hard ImageNet's ablations gray by mask and gray by box); `tiled`: the object's box is filled from its surroundings.
    - `noise_fg_30`, `noise_bg_30`, ...: Gaussian noise of that standard deviation (of 255) on the object, or on the background,
      then clipping (RIVAL10). `noise_l2_fg_10`, ...: noise of the same L2 norm on object and background, level * sqrt(3 H W)
      before clipping, so that a small object gets as much noise as a large background [R].
    - `mixed_same`, `mixed_next`, `mixed_rand_0`, ...: the object on the object-free background of another image of its class, of
      the next class, of a random class (IN-9, Xiao et al. 2020).
    - `challenge`: the object on the background of every other image, correct only if all of these are.

    >>> plan(2)[-4:]
    ['mixed_same', 'mixed_next', 'mixed_rand_0', 'mixed_rand_1']
    """
    noise = [f"noise_{w}_{level}" for level in STD_LEVELS for w in ("fg", "bg")]
    l2 = [f"noise_l2_{w}_{level}" for level in L2_LEVELS for w in ("fg", "bg")]
    swaps = [*SWAPS, *(f"mixed_rand_{i}" for i in range(backgrounds))]
    swaps += [CHALLENGE] if challenge else []
    return ["original", "fg_only", "bg_only_mask", "bg_only_box", "tiled", *noise, *l2, *swaps]


def intervene(name: str, subject: Subject, fill: Sequence[int], noise: Tensor) -> Tensor | None:
    """Apply one intervention.

    Args:
        name: see `plan`; all except the swapped backgrounds.
        subject: the image.
        fill: color of erased pixels.
        noise: see `noise_pattern`.

    Returns:
        uint8 `[H, W, 3]`; None for `bg_only_mask` if the image has no mask.
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
    """Draw the noise pattern of an image, which is the same for all noise levels and for object and background.

    Args:
        subject: the image; its key seeds the noise.
        grain: side of the model's view. The noise has one value per pixel of the image at that size (at most one per pixel of
            the file), so that its effect hardly depends on the resolution of the file [R].
        seed: random seed.

    Returns:
        `[H, W, 3]` with mean 0 and standard deviation 1.
    """
    height, width = subject.pixels.shape[:2]
    scale = min(1.0, grain / max(height, width))
    rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
    noise = torch.randn(rows, columns, 3, generator=torch.Generator().manual_seed(number_of(seed, subject.key, "noise")))
    return noise[torch.arange(height) * rows // height][:, torch.arange(width) * columns // width]


def add_noise(pixels: Tensor, inside: Tensor, noise: Tensor, level: float, *, l2: bool = False) -> Tensor:
    """Add noise to a part of an image.

    Args:
        pixels: uint8 `[H, W, 3]`.
        inside: `[H, W]` bool, where the noise is added.
        noise: `[H, W, 3]`, see `noise_pattern`.
        level: standard deviation on [0, 1] pixels; with `l2`, root mean square of the noise over the whole image.
        l2: scale the noise to a fixed L2 norm, whatever the size of the part.

    Returns:
        uint8 `[H, W, 3]`, clipped.
    """
    noise = noise * inside[..., None]
    if l2:
        noise = noise * noise.numel() ** 0.5 / noise.norm().clamp(min=1e-12)
    return ((pixels / 255 + level * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def swap(subject: Subject, background: Tensor) -> Tensor:
    """Paste the best object of an image onto the background of another.

    Args:
        subject: the image.
        background: uint8 `[h, w, 3]`, without objects.

    Returns:
        uint8 `[H, W, 3]`, in the size of the subject.
    """
    return paste_object(subject.pixels, subject.boxes[0], subject.mask, background)


class Donors:
    """Draw the images whose backgrounds each image gets.

    Args:
        keys: names of the rows.
        labels: their classes.
        backgrounds: random backgrounds per row.
        seed: random seed.
        images: index of each row's image, if several rows show the same one; these never exchange backgrounds.
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
        """Draw the row whose background each intervention uses (see `plan`); interventions without one are left out."""
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
        while len(drawn) < most:  # the class first, so that large classes do not dominate
            other = rng.choice(self.members[rng.choice(self.classes)])
            if self.images[other] not in seen:
                seen.add(self.images[other])
                drawn.append(other)
        return {**found, **{f"mixed_rand_{i}": other for i, other in enumerate(drawn)}}

    def others(self, row: int) -> list[int]:
        """Return one row of every other image, in random order."""
        first = {image: i for i, image in reversed(list(enumerate(self.images)))}
        rows = sorted(i for image, i in first.items() if image != self.images[row])
        random.Random(number_of(self.seed, self.keys[row], CHALLENGE)).shuffle(rows)
        return rows


def number_of(seed: int, *parts: str) -> int:
    """Hash a seed and names to a 63-bit integer, the same on every machine."""
    text = "\0".join((str(seed), *parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1

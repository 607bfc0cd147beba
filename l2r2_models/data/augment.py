"""Augmentation of image, box and mask together, at the image's own resolution, before views are cut."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import L2R2Error

TRIES = 10


@dataclass(frozen=True)
class Augment:
    """Random crop, flip and color of the whole image, then occlusion of the object and jitter of its box.

    A crop that hides most of the object is drawn again; after ten tries the image is not cropped, so that a box never leaves its
    image.

    Attributes:
        scale: minimum area of the random crop, relative to the image; 1 turns it off.
        flip: probability of a horizontal flip.
        color: strength of the brightness, contrast and saturation jitter; 0 turns it off.
        box_jitter: maximum shift of each edge of the box, relative to the box's side.
        min_visible: minimum fraction of the box's area that a crop must keep.
        occlusion: probability that noise covers a rectangle inside the box, 5 to 40 % of it, in all views alike (Random Erasing,
            Zhong et al. 2020).

    Raises:
        L2R2Error: when a value is outside [0, 1].

    >>> augment = Augment(scale=1.0, flip=1.0, color=0.0, box_jitter=0.0)
    >>> augment(torch.zeros(4, 8, 3, dtype=torch.uint8), torch.tensor([0.0, 0.0, 2.0, 4.0]), None, seed=(0,))[1]
    tensor([6., 0., 8., 4.])
    """

    scale: float = 0.5
    flip: float = 0.5
    color: float = 0.2
    box_jitter: float = 0.1
    min_visible: float = 0.7
    occlusion: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "flip", "color", "box_jitter", "min_visible", "occlusion"):
            if not 0 <= getattr(self, name) <= 1:
                raise L2R2Error(f"Augmentation {name} must lie between 0 and 1, got {getattr(self, name)}.")

    def __call__(
        self, pixels: Tensor, box: Tensor, mask: Tensor | None, *, seed: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Augment an image.

        Args:
            pixels: uint8 `[H, W, 3]`.
            box: `[4]` xyxy in pixels; NaN if there is none.
            mask: `[H, W]` bool, or None.
            seed: the same seed gives the same result.

        Returns:
            The new pixels, box and mask.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random.Random(str(seed)).getrandbits(63))  # CPU only, which is much faster
            return self._draw(pixels, box, mask)

    def least_sides(self, size: tuple[int, int], box: Tensor, square: bool) -> tuple[float, float]:
        """Return the smallest sides in pixels that the image and the box can have after augmentation.

        Args:
            size: `(height, width)` of the image.
            box: `[4]` xyxy in pixels.
            square: whether the longer side counts, because views are padded to a square; else the shorter one.
        """
        longer = max if square else min
        width, height = (box[2:] - box[:2]).tolist()
        whole, part = float(longer(size)), float(longer(width, height))
        if self.scale < 1:
            aspect = 1.0 if square else 3 / 4  # of the crop, at least
            whole = min(math.sqrt(size[0] * size[1] * self.scale * aspect), *size)
            part *= self.min_visible
        return whole, part * (1 - 2 * self.box_jitter)

    def _draw(self, pixels: Tensor, box: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        has_box = bool(box.isfinite().all())
        item = {
            "image": tv_tensors.Image(pixels.permute(2, 0, 1)),
            "box": tv_tensors.BoundingBoxes(box.nan_to_num()[None], format="XYXY", canvas_size=pixels.shape[:2]),
            **({} if mask is None else {"mask": tv_tensors.Mask(mask[None])}),
        }
        item = self._crop(item, has_box)
        item = v2.RandomHorizontalFlip(self.flip)(item)
        if self.color:
            item["image"] = v2.ColorJitter(self.color, self.color, self.color)(item["image"])
        image, moved = item["image"].as_subclass(Tensor).permute(1, 2, 0).contiguous(), box
        if has_box:
            exact = item["box"].as_subclass(Tensor)[0]
            moved = self._jitter(exact)
            if self.occlusion and torch.rand(1).item() < self.occlusion:
                _occlude(image, exact)
        cut_mask = item["mask"].as_subclass(Tensor)[0].contiguous() if mask is not None else None
        return image, moved, cut_mask

    def _crop(self, item: dict[str, Any], has_box: bool) -> dict[str, Any]:
        from torchvision.transforms import v2

        if self.scale >= 1:
            return item
        crop = v2.RandomResizedCrop(1, scale=(self.scale, 1.0))
        before = _area(item["box"])
        for _ in range(TRIES):
            where = crop.make_params([item["image"]])
            window = [where[k] for k in ("top", "left", "height", "width")]
            moved = {k: v2.functional.crop(v, *window) for k, v in item.items()}
            moved["box"] = v2.functional.clamp_bounding_boxes(moved["box"])
            if not has_box or (before > 0 and _area(moved["box"]) >= self.min_visible * before):
                return moved
        return item

    def _jitter(self, box: Tensor) -> Tensor:
        sides = (box[2:] - box[:2]).repeat(2)
        return box + (torch.rand(4) * 2 - 1) * self.box_jitter * sides


def _occlude(image: Tensor, box: Tensor) -> None:
    """Cover a rectangle inside the box `[4]` with noise, in place, in uint8 pixels `[H, W, 3]`."""
    share, stretch, left, top = torch.rand(4).tolist()
    area, aspect = 0.05 + 0.35 * share, 3 ** (2 * stretch - 1)  # both relative to the box
    across, down = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
    x0, y0, x1, y1 = box.tolist()
    x, y = x0 + left * (1 - across) * (x1 - x0), y0 + top * (1 - down) * (y1 - y0)
    part = image[round(y) : round(y + down * (y1 - y0)), round(x) : round(x + across * (x1 - x0))]
    part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8))


def _area(box: Tensor) -> float:
    x0, y0, x1, y1 = map(float, box.as_subclass(Tensor)[0].tolist())
    return max(0.0, x1 - x0) * max(0.0, y1 - y0)

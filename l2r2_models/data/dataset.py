"""The training data set: rows of a table, decoded, augmented, and cut into the views of each branch."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..images import LazyImage, load_mask
from ..views import Patches, ViewSpec, decode_patches, make_views, mask_in_full_view, scale_of, takes_patches, view_map
from .augment import Augment
from .composite import background_of, paste_object
from .near_duplicates import perceptual_hash
from .table import ImageTable, Row


@dataclass(frozen=True)
class Check:
    """The result of `check_images`.

    Attributes:
        bad: images that cannot be used, with the reason.
        with_box: images with a usable object.
        hashes: perceptual hash of each readable image.
    """

    bad: dict[Path, str]
    with_box: frozenset[Path]
    hashes: dict[Path, bytes]


def check_images(
    table: ImageTable,
    progress: Callable[[Iterable[None], int], Iterable[None]],
    box_threshold: float = 0.0,
    usable: Callable[[Sample], bool] = lambda sample: sample.has_box,
) -> Check:
    """Decode every image once, check whether it has an object, and hash it.

    Args:
        table: the rows to check.
        progress: wraps an iterable of a given length to show progress.
        box_threshold: see `sample_of`.
        usable: whether a sample's object can be used; by default, whether it has a box.
    """
    bad: dict[Path, str] = {}
    with_box: list[Path] = []
    hashes: dict[Path, bytes] = {}

    def check(row: Row) -> None:
        try:
            sample = sample_of(row, (0, 0, 0), box_threshold)
            hashes[row.path] = perceptual_hash(Image.fromarray(sample.pixels.numpy()))
            if usable(sample):
                with_box.append(row.path)
        except L2R2Error as error:
            bad[row.path] = str(error)

    with ThreadPoolExecutor(2) as pool:
        for _ in progress(pool.map(check, table.rows), len(table)):
            pass
    return Check({row.path: bad[row.path] for row in table.rows if row.path in bad}, frozenset(with_box), hashes)


@dataclass(frozen=True)
class Sample:
    """One decoded image.

    Attributes:
        pixels: uint8 `[H, W, 3]`.
        box: `[4]` xyxy in pixels; NaN if there is no object.
        mask: `[H, W]` bool, or None.
        score: the localizer's score of the box; 1 without a localizer.
        swapped: whether the object was pasted onto another background.
    """

    pixels: Tensor
    box: Tensor
    mask: Tensor | None
    score: float = 1.0
    swapped: bool = False

    @property
    def has_box(self) -> bool:
        """Whether there is an object."""
        return bool(self.box.isfinite().all())


class Uncut(NamedTuple):
    """What the views of one row are cut from; the attributes are those of `Sample`."""

    pixels: Tensor | Patches
    box: Tensor
    mask: Tensor | None


def sample_of(
    row: Row,
    fill: Sequence[int],
    box_threshold: float = 0.0,
    draw: random.Random | None = None,
    scale_of_image: Callable[[tuple[int, int], Tensor], int] = lambda size, box: 1,
) -> Sample:
    """Decode a row's image, choose one usable box, and swap the background if the row has another.

    Args:
        row: the row. With a `background`, the object is pasted at its own place onto the object-free background of that row,
            unless one of the two has no object; then the image is unchanged. A background without boxes and mask is used
            unchanged.
        fill: color under transparent pixels.
        box_threshold: boxes with a lower score count as not found.
        draw: chooses one of several boxes at random; None uses the best one.
        scale_of_image: the factor by which to reduce an image of a size `(height, width)` with this box; not applied to images
            with a mask or another background. The sample has the size of the reduced image.

    Raises:
        ImageError: when an image or mask cannot be read.
        L2R2Error: when the boxes were made for another image size.
    """
    image = LazyImage(row.path, fill=fill)
    found, mask = _objects(row, image.size, box_threshold)
    pick = draw.randrange(len(found)) if draw and len(found) else 0
    box = found.boxes[pick] if len(found) else torch.full((4,), float("nan"))
    if mask is None and len(found) and found.masks is not None:
        mask = found.masks[pick]
    scale = scale_of_image(image.size, box) if mask is None and row.background is None else 1
    pixels = image.pixels(scale)
    if not len(found):
        return Sample(pixels, box, mask)
    swapped = False
    if row.background is not None:
        other, objects, other_mask = _decode(row.background, fill, box_threshold)
        if len(objects) or row.background.is_bare:
            empty = background_of(other, objects.boxes, other_mask) if len(objects) else other
            pixels, swapped = paste_object(pixels, box, _of_box(mask, found, pick), empty), True
    return Sample(pixels, box / scale, mask, float(found.scores[pick]), swapped)


def _decode(row: Row, fill: Sequence[int], box_threshold: float) -> tuple[Tensor, Detections, Tensor | None]:
    """Return the pixels `[H, W, 3]`, all usable objects, and the mask of the mask file; without boxes, the box of the mask."""
    image = LazyImage(row.path, fill=fill)
    found, mask = _objects(row, image.size, box_threshold)
    return image.pixels(), found, mask


def _objects(row: Row, size: tuple[int, int], box_threshold: float) -> tuple[Detections, Tensor | None]:
    """Return all usable objects of an image of this size, and the mask of the mask file; without boxes, the box of the mask."""
    mask = load_mask(row.mask_file, size) if row.mask_file else None
    if row.entry is not None:
        return row.entry.detections(size, str(row.path)).above(box_threshold).usable(), mask
    return (Detections.from_lists([], size) if mask is None else Detections.from_mask(mask)), mask


def _of_box(mask: Tensor | None, found: Detections, pick: int) -> Tensor | None:
    """Return the part of an image's mask that belongs to one of its objects."""
    if mask is None or len(found) == 1:
        return mask
    x0, y0, x1, y1 = found.windows()[0][pick].tolist()
    own = torch.zeros_like(mask)
    own[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    return own


def _was_localized(row: Row) -> bool:
    return row.mask_file is not None if row.entry is None else row.entry.failure is None


class ViewDataset(Dataset[dict[str, Any]]):
    """Rows as training items: the views of each branch, `has_fg`, and the class index as `labels`.

    Random numbers depend on (seed, epoch, row), so an item does not depend on the worker that loads it, or on interruptions. With
    augmentation, one of an image's boxes is drawn in each epoch; without augmentation, the best one is used.

    Args:
        table: the rows, with labels.
        classes: all labels, in the order of their indices.
        spec: see `make_views`.
        branches: see `make_views`.
        augment: the augmentation, for training only.
        background_swap: probability that an item's object is pasted onto the object-free background of another random image of
            the table (of any class), before `augment`. Rows without an object are unchanged.
        swapped_views: branches whose view is cut a second time, as `swapped_BRANCH`: with the object on the background of another
            random image, and otherwise the same augmentation. Items then include `swapped`, which is False if the object could
            not be pasted, and both views are cut from the whole decoded image.
        box_threshold: see `sample_of`.
        objectness: whether items include `objectness`, the box's score.
        locate: whether items include `box` `[4]`, the object in the full view, xyxy relative to its sides (NaN if there is none),
            and `localized`, which is False if the localizer failed or the box file does not list the image.
        segment: whether items include `object_mask` `[S, S]`, how much of each pixel of the full view the object covers (nothing
            if there is no object), and `has_mask`, which is False for an object without a mask, or if `localized` would be False.
        cut: whether to cut views; if False, items include `uncut` (and `swapped_uncut`) for `ViewLoader`.
        seed: random seed.

    Raises:
        L2R2Error: when a row has no label, or one that is not in `classes`, or when backgrounds should be swapped and fewer than
            two images have an object.
    """

    def __init__(
        self,
        table: ImageTable,
        classes: Sequence[str],
        spec: ViewSpec,
        branches: Sequence[str],
        *,
        augment: Augment | None = None,
        background_swap: float = 0.0,
        swapped_views: Sequence[str] = (),
        box_threshold: float = 0.0,
        objectness: bool = False,
        locate: bool = False,
        segment: bool = False,
        cut: bool = True,
        seed: int = 0,
    ) -> None:
        index = {label: i for i, label in enumerate(classes)}
        if any(row.label is None for row in table.rows):
            raise L2R2Error(f"{table.root}: an image of the split {table.rows[0].split} has no label.")
        if unknown := sorted({str(row.label) for row in table.rows} - set(index)):
            raise L2R2Error(f"{table.root}: the label {unknown[0]} does not occur in training.")
        self.rows, self.spec, self.branches, self.augment = table.rows, spec, tuple(branches), augment
        self.targets = [index[str(row.label)] for row in table.rows]
        self.box_threshold, self.locate, self.seed, self.epoch = box_threshold, locate, seed, 0
        self.segment, self.cut = segment, cut
        self.background_swap, self.objectness, self.swapped_views = background_swap, objectness, tuple(swapped_views)
        self.groups: list[int] | None = None  # items then include `group`
        swaps = bool(background_swap or swapped_views)
        self.donors = [row for row in table.whole_images() if row.may_have_object(box_threshold)] if swaps else []
        if swaps and len(self.donors) < 2:
            raise L2R2Error(f"{table.root}: swapping backgrounds needs at least two images with a box or mask.")

    def without_augmentation(self) -> ViewDataset:
        """Return a copy that cuts views, without augmentation or background swaps, for metrics on the training rows."""
        plain = copy.copy(self)
        plain.augment, plain.background_swap, plain.swapped_views, plain.cut = None, 0.0, (), True
        return plain

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that random numbers depend on; called by the Trainer at the start of each epoch."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if (
            self.augment is None
            and not self.background_swap
            and not self.swapped_views
            and self.rows[i].background is None
            and takes_patches(self.spec, self.branches)
        ):
            pixels: Tensor | Patches
            patches, box, mask, score = self._patches(self.rows[i])
            pixels, size = patches, patches.size
        else:
            sample = self._sample(i)
            pixels, box, mask, score = sample.pixels, sample.box, sample.mask, sample.score
            size = (pixels.shape[0], pixels.shape[1])
        item = self._views(Uncut(pixels, box, mask)) | {"labels": self.targets[i]}
        if self.swapped_views:
            again = self._sample(i, again=True)
            item |= self._views(Uncut(again.pixels, again.box, again.mask), swapped=True) | {"swapped": again.swapped}
        if self.groups is not None:
            item["group"] = self.groups[i]
        if self.objectness:
            item["objectness"] = score
        if self.locate:
            item |= {"box": self._in_full_view(box, size), "localized": _was_localized(self.rows[i])}
        if self.segment:
            known = mask is not None or (not box.isfinite().all() and _was_localized(self.rows[i]))
            target = torch.zeros(size, dtype=torch.bool) if mask is None else mask
            item |= {"object_mask": mask_in_full_view(target, self.spec), "has_mask": known}
        return item

    def _views(self, shown: Uncut, swapped: bool = False) -> dict[str, Any]:
        """Cut the views of a row, unless `cut` is False."""
        if not self.cut:
            return {"swapped_uncut" if swapped else "uncut": shown}
        return {name: value[0] for name, value in self.views_of([shown], swapped).items()}

    def views_of(
        self, rows: Sequence[Uncut], swapped: bool = False, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Cut the views of several rows.

        Args:
            rows: what to cut them from.
            swapped: whether these are the objects on other backgrounds, see `swapped_views`.
            device: where to cut, see `make_views`.

        Returns:
            The views `[B, ...]` by the names that they have in the items.
        """
        boxes, masks = torch.stack([row.box for row in rows]), [row.mask for row in rows]
        branches = self.swapped_views if swapped else self.branches
        views = make_views([row.pixels for row in rows], boxes, self.spec, branches=branches, masks=masks, device=device).inputs()
        return {f"swapped_{branch}": views[branch] for branch in branches} if swapped else views

    def _patches(self, row: Row) -> tuple[Patches, Tensor, Tensor | None, float]:
        """Return what `sample_of` would, with the patches that the views show instead of the whole image, and the box score."""
        image = LazyImage(row.path, fill=self.spec.fill)
        found, mask = _objects(row, image.size, self.box_threshold)
        box = found.boxes[0] if len(found) else torch.full((4,), float("nan"))
        if mask is None and len(found) and found.masks is not None:
            mask = found.masks[0]
        patches = decode_patches(image, box[None], self.spec, self.branches)
        return patches, box, mask, float(found.scores[0]) if len(found) else 1.0

    def _in_full_view(self, box: Tensor, size: tuple[int, int]) -> Tensor:
        view = view_map("full", self.spec, size)
        (window,), (found,) = Detections(box[None], torch.ones(1), size).windows()
        return view.boxes_to_view(window.float()) / self.spec.size_of("full") if found else torch.full((4,), float("nan"))

    def _sample(self, i: int, again: bool = False) -> Sample:
        """Return an augmented sample; `again` puts the same one on another background."""
        row, of_item = self.rows[i], (self.seed, self.epoch, i)
        draw = random.Random(f"sample {of_item}")  # independent of the random numbers of `augment`
        if draw.random() < self.background_swap:
            row = replace(row, background=self._donor(row, draw))
        if again:
            row = replace(row, background=self._donor(row, random.Random(f"swapped {of_item}")))
        sample = sample_of(row, self.spec.fill, self.box_threshold, draw if self.augment else None, self._scale)
        if self.augment is None:
            return sample
        return Sample(*self.augment(sample.pixels, sample.box, sample.mask, seed=of_item), sample.score, sample.swapped)

    def _scale(self, size: tuple[int, int], box: Tensor) -> int:
        """Return the factor by which the views after augmentation allow an image to be reduced (`docs/method.md`, Views)."""
        if self.augment is None or self.swapped_views or not takes_patches(self.spec, self.branches):
            return 1
        whole, part = self.augment.least_sides(size, box, self.spec.square)
        sides = {"full": whole}
        if "fg" in self.branches and not box.isnan().any():
            sides["fg"] = part if self.spec.fg.crops else whole
        shown = [(math.floor(side), branch) for branch, side in sides.items() if branch in (*self.branches, "full")]
        return min(scale_of((0, 0, side, side), self.spec, branch) for side, branch in shown)

    def _donor(self, row: Row, draw: random.Random) -> Row:
        while (donor := draw.choice(self.donors)).path == row.path:
            pass
        return donor

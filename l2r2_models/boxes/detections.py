"""Boxes of one image, and the mapping between an image and a view cut from it.

Throughout the project, boxes are `[..., 4]` float32 xyxy in absolute pixels of the upright image, with an exclusive end. Other
formats exist only in box files, which `boxes.read` and `boxes.write` convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from l2r2_kernels.roi_views.reference import integer_boxes
from torch import Tensor

from ..errors import L2R2Error

BOX_THRESHOLD = 0.2  # default: boxes with a lower score count as not found


@dataclass(frozen=True)
class Detections:
    """The boxes found in one image, best first.

    Attributes:
        boxes: `[N, 4]` float32 xyxy pixels.
        scores: `[N]` float32 in [0, 1].
        image_size: `(height, width)` of the image that the boxes refer to.
        labels: N strings, "" where the localizer gives none.
        masks: `[N, H, W]` bool, or None.

    Raises:
        L2R2Error: when the shapes do not match.

    >>> found = Detections.from_lists([[0, 0, 4, 4], [2, 2, 8, 6]], image_size=(6, 8), scores=[0.1, 0.9])
    >>> found.above(0.5).boxes
    tensor([[2., 2., 8., 6.]])
    """

    boxes: Tensor
    scores: Tensor
    image_size: tuple[int, int]
    labels: tuple[str, ...] = field(default=())
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise L2R2Error(f"Detections need boxes [N, 4], got {list(self.boxes.shape)}.")
        count = len(self.boxes)
        if self.scores.shape != (count,):
            raise L2R2Error(f"Detections need one score per box, got {list(self.scores.shape)} for {count} boxes.")
        if self.labels == () and count:
            object.__setattr__(self, "labels", ("",) * count)
        if len(self.labels) != count:
            raise L2R2Error(f"Detections need one label per box, got {len(self.labels)} for {count} boxes.")
        if self.masks is not None and tuple(self.masks.shape) != (count, *self.image_size):
            raise L2R2Error(f"Detections need masks [N, H, W] = {[count, *self.image_size]}, got {list(self.masks.shape)}.")

    @classmethod
    def from_lists(
        cls,
        boxes: Sequence[Sequence[float]],
        image_size: tuple[int, int],
        scores: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
        *,
        sort: bool = True,
    ) -> Detections:
        """Create detections from plain numbers.

        Args:
            boxes: N boxes xyxy in pixels.
            image_size: `(height, width)` of the image.
            scores: N scores; by default 1, as for human annotations.
            labels: N labels; by default "".
            sort: sort by score, best first.

        Raises:
            L2R2Error: when a box is not four numbers, or there is not one score and one label per box.
        """
        try:  # through float64, because torch refuses numbers too large for float32
            box_tensor = torch.as_tensor(boxes, dtype=torch.float64).float()
            score_tensor = torch.ones(len(boxes)) if scores is None else torch.as_tensor(scores, dtype=torch.float64).float()
        except (TypeError, ValueError, RuntimeError):
            raise L2R2Error("Boxes are four numbers each, [[x0, y0, x1, y1], ...], and scores one number each.") from None
        box_tensor = box_tensor.reshape(0, 4) if box_tensor.numel() == 0 else box_tensor
        names = ("",) * len(box_tensor) if labels is None else tuple(labels)
        found = cls(box_tensor, score_tensor, image_size, names)
        return found.sorted() if sort else found

    @classmethod
    def from_supervision(cls, found: Any, image_size: tuple[int, int]) -> Detections:
        """Convert `supervision.Detections`, with their masks and class names, best first.

        Args:
            found: detections of one image; without confidences, every score is 1.
            image_size: `(height, width)` of the image.

        Raises:
            L2R2Error: when the masks have another size than the image.
        """
        scores = None if found.confidence is None else found.confidence.tolist()
        names = found.data.get("class_name")
        labels = None if names is None else [str(name) for name in names]
        boxes = cls.from_lists(found.xyxy.tolist(), image_size, scores, labels, sort=False)
        masks = None if found.mask is None else torch.as_tensor(found.mask, dtype=torch.bool)
        return replace(boxes, masks=masks).sorted()

    @classmethod
    def from_mask(cls, mask: Tensor) -> Detections:
        """The tight box of an object mask `[H, W]` bool, with score 1; no box if the mask is empty.

        >>> Detections.from_mask(torch.eye(4, 6, dtype=torch.bool)).boxes
        tensor([[0., 0., 4., 4.]])
        """
        rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
        boxes = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]] if rows else []
        return cls.from_lists(boxes, (mask.shape[0], mask.shape[1]))

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: Tensor) -> Detections:
        """The detections at `index` (bool or int tensor), in that order."""
        if index.dtype == torch.bool and index.all():  # the usual case
            return self
        positions = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        return replace(
            self,
            boxes=self.boxes[positions],
            scores=self.scores[positions],
            labels=tuple(self.labels[i] for i in positions.tolist()),
            masks=None if self.masks is None else self.masks[positions],
        )

    def sorted(self) -> Detections:
        """Sort by score, best first; equal scores keep their order, NaN comes last."""
        if len(self) < 2:
            return self
        return self.select(torch.argsort(self.scores.nan_to_num(nan=-torch.inf), descending=True, stable=True))

    def above(self, threshold: float) -> Detections:
        """The detections whose score is at least `threshold`; NaN scores are dropped."""
        return self.select(self.scores >= threshold)

    def clipped(self) -> Detections:
        """Clip the boxes to the image."""
        height, width = self.image_size
        return replace(self, boxes=self.boxes.clamp(min=0).minimum(self.boxes.new_tensor([width, height, width, height])))

    def usable(self) -> Detections:
        """Drop boxes that are not finite or cover no pixel of the image."""
        _, valid = self.windows()
        return self.select(valid)

    def windows(self, margin: float = 0.0) -> tuple[Tensor, Tensor]:
        """The integer boxes that views are cut from, `[N, 4]` int64, and which of them contain a pixel, `[N]` bool.

        Args:
            margin: how far each box is grown at each end, relative to its side.
        """
        height, width = (torch.tensor(side).expand(len(self.boxes)) for side in self.image_size)
        windows, valid = integer_boxes(self.boxes, height, width, margin)
        return windows, valid


@dataclass(frozen=True)
class ViewMap:
    """The mapping between a view and its image, for boxes and dense maps.

    Attributes:
        window: `(x0, y0, x1, y1)` integer box that the view was cut from.
        view_size: `(height, width)` of the view.
        square: whether the window was padded to a square before the resize.

    >>> ViewMap(window=(10, 10, 30, 20), view_size=(40, 40)).boxes_to_image(torch.tensor([0.0, 10.0, 40.0, 30.0]))
    tensor([10., 10., 30., 20.])
    """

    window: tuple[int, int, int, int]
    view_size: tuple[int, int]
    square: bool = True

    @property
    def canvas(self) -> tuple[int, int, int, int]:
        """The window with its padding, in image coordinates; it may extend beyond the image."""
        x0, y0, x1, y1 = self.window
        width, height = x1 - x0, y1 - y0
        if not self.square:
            return self.window
        side = max(width, height)
        left, top = x0 - (side - width) // 2, y0 - (side - height) // 2
        return left, top, left + side, top + side

    def boxes_to_image(self, boxes: Tensor) -> Tensor:
        """Map boxes `[..., 4]` xyxy from pixels of the view to pixels of the image."""
        x0, y0, x1, y1 = self.canvas
        scale = boxes.new_tensor([(x1 - x0) / self.view_size[1], (y1 - y0) / self.view_size[0]]).repeat(2)
        return boxes * scale + boxes.new_tensor([x0, y0, x0, y0])

    def boxes_to_view(self, boxes: Tensor) -> Tensor:
        """Map boxes `[..., 4]` xyxy from pixels of the image to pixels of the view."""
        x0, y0, x1, y1 = self.canvas
        scale = boxes.new_tensor([self.view_size[1] / (x1 - x0), self.view_size[0] / (y1 - y0)]).repeat(2)
        return (boxes - boxes.new_tensor([x0, y0, x0, y0])) * scale

    def map_to_image(self, values: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Resize a map `[h, w]` over the view (e.g. saliency) to `[H, W]` over the image, 0 outside the view."""
        x0, y0, x1, y1 = self.canvas
        height, width = y1 - y0, x1 - x0
        canvas = torch.nn.functional.interpolate(
            values[None, None].float(), (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0, 0]
        out = torch.zeros(image_size)
        wx0, wy0, wx1, wy1 = self.window
        out[wy0:wy1, wx0:wx1] = canvas[wy0 - y0 : wy1 - y0, wx0 - x0 : wx1 - x0]
        return out

"""Boxes of one image: what a localizer found, and the geometry between the image and a view cut from it.

Everywhere inside the project boxes are `[..., 4]` float32 xyxy in absolute pixels of the upright image, exclusive end.
Other forms exist only in `box_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from l2r2_kernels.roi_views.reference import integer_boxes
from torch import Tensor

from ..errors import L2R2Error

BOX_THRESHOLD = 0.2  # boxes with a lower score count as not found, where nothing else is said


@dataclass(frozen=True)
class Detections:
    """Everything found in one image, best first.

    Attributes:
        boxes: `[N, 4]` float32 xyxy pixels.
        scores: `[N]` float32 in [0, 1].
        image_size: `(height, width)` of the image the boxes refer to.
        labels: N strings, "" where the localizer names none.
        masks: `[N, H, W]` bool, or None.
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
            raise L2R2Error(f"Detections need one score a box, got {list(self.scores.shape)} for {count}.")
        if self.labels == () and count:
            object.__setattr__(self, "labels", ("",) * count)
        if len(self.labels) != count:
            raise L2R2Error(f"Detections need one label a box, got {len(self.labels)} for {count}.")
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
        """From plain numbers; a missing score is 1 (a box given by a person). By default sorted by score, best first.

        Raises:
            L2R2Error: a box is not four numbers, or the scores or labels are not one a box.
        """
        try:  # by way of float64, because float32 refuses what is too large for it
            box_tensor = torch.as_tensor(boxes, dtype=torch.float64).float()
            score_tensor = torch.ones(len(boxes)) if scores is None else torch.as_tensor(scores, dtype=torch.float64).float()
        except (TypeError, ValueError, RuntimeError):
            raise L2R2Error("Boxes are four numbers each, [[x0, y0, x1, y1], ...], and scores one number each.") from None
        box_tensor = box_tensor.reshape(0, 4) if box_tensor.numel() == 0 else box_tensor
        names = ("",) * len(box_tensor) if labels is None else tuple(labels)
        found = cls(box_tensor, score_tensor, image_size, names)
        return found.sorted() if sort else found

    @classmethod
    def from_mask(cls, mask: Tensor) -> Detections:
        """The tight box of an object mask `[H, W]` bool, with score 1; none where the mask is empty."""
        rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
        boxes = [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]] if rows else []
        return cls.from_lists(boxes, (mask.shape[0], mask.shape[1]))

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: Tensor) -> Detections:
        """The detections at `index` (bool or int tensor), in that order."""
        positions = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        return replace(
            self,
            boxes=self.boxes[positions],
            scores=self.scores[positions],
            labels=tuple(self.labels[i] for i in positions.tolist()),
            masks=None if self.masks is None else self.masks[positions],
        )

    def sorted(self) -> Detections:
        """Best score first; equal scores keep their order, NaN comes last."""
        return self.select(torch.argsort(self.scores.nan_to_num(nan=-torch.inf), descending=True, stable=True))

    def above(self, threshold: float) -> Detections:
        """Those whose score is at least `threshold`; NaN scores go."""
        return self.select(self.scores >= threshold)

    def clipped(self) -> Detections:
        """Boxes clipped to the image."""
        height, width = self.image_size
        return replace(self, boxes=self.boxes.clamp(min=0).minimum(self.boxes.new_tensor([width, height, width, height])))

    def usable(self) -> Detections:
        """Without the boxes that cover no pixel of the image, or that are not finite."""
        _, valid = self.windows()
        return self.select(valid)

    def windows(self, margin: float = 0.0) -> tuple[Tensor, Tensor]:
        """The integer boxes that a view is cut from, `[N, 4]` int64, and which of them hold a pixel, `[N]` bool."""
        height, width = (torch.tensor(side).expand(len(self.boxes)) for side in self.image_size)
        return integer_boxes(self.boxes, height, width, margin)


@dataclass(frozen=True)
class ViewMap:
    """Where a square view comes from in its image; maps points, boxes and maps of the view back.

    Attributes:
        window: `(x0, y0, x1, y1)` integer box the view was cut from.
        view_size: `(height, width)` of the view.
        square: whether the window was padded to a square before the resize.
    """

    window: tuple[int, int, int, int]
    view_size: tuple[int, int]
    square: bool = True

    @property
    def canvas(self) -> tuple[int, int, int, int]:
        """The window with its padding, in image coordinates; may lie partly outside of the image."""
        x0, y0, x1, y1 = self.window
        width, height = x1 - x0, y1 - y0
        if not self.square:
            return self.window
        side = max(width, height)
        left, top = x0 - (side - width) // 2, y0 - (side - height) // 2
        return left, top, left + side, top + side

    def boxes_to_image(self, boxes: Tensor) -> Tensor:
        """Boxes `[..., 4]` xyxy in pixels of the view -> pixels of the image."""
        x0, y0, x1, y1 = self.canvas
        scale = boxes.new_tensor([(x1 - x0) / self.view_size[1], (y1 - y0) / self.view_size[0]]).repeat(2)
        return boxes * scale + boxes.new_tensor([x0, y0, x0, y0])

    def boxes_to_view(self, boxes: Tensor) -> Tensor:
        """Boxes `[..., 4]` xyxy in pixels of the image -> pixels of the view."""
        x0, y0, x1, y1 = self.canvas
        scale = boxes.new_tensor([self.view_size[1] / (x1 - x0), self.view_size[0] / (y1 - y0)]).repeat(2)
        return (boxes - boxes.new_tensor([x0, y0, x0, y0])) * scale

    def map_to_image(self, values: Tensor, image_size: tuple[int, int]) -> Tensor:
        """A map `[h, w]` over the view (saliency, probability) -> `[H, W]` over the image, 0 where the view saw nothing."""
        x0, y0, x1, y1 = self.canvas
        height, width = y1 - y0, x1 - x0
        canvas = torch.nn.functional.interpolate(
            values[None, None].float(), (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0, 0]
        out = torch.zeros(image_size)
        wx0, wy0, wx1, wy1 = self.window
        out[wy0:wy1, wx0:wx1] = canvas[wy0 - y0 : wy1 - y0, wx0 - x0 : wx1 - x0]
        return out

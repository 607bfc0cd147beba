"""Regions of a mask on a grid over a view, and the boxes around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from ..boxes.detections import Detections, ViewMap
from ..errors import L2R2Error


def largest_region(mask: Tensor, weight: Tensor) -> Tensor:
    """Select the 4-connected region of a mask with the largest total weight.

    Args:
        mask: `[h, w]` bool.
        weight: `[h, w]`.

    Returns:
        `[h, w]` bool; empty if the mask is.
    """
    regions = label_regions(mask)
    sums = torch.zeros(int(regions.max()) + 1, dtype=torch.double).index_add_(0, regions.flatten(), weight.double().flatten())
    sums[0] = -1.0  # the region outside the mask
    return (regions == int(sums.argmax())) & mask


def label_regions(mask: Tensor) -> Tensor:
    """Number the 4-connected regions of a mask: `[h, w]` int64, 0 outside the mask.

    Raises:
        L2R2Error: when scipy is missing.
    """
    try:
        from scipy.ndimage import label
    except ImportError as error:
        raise L2R2Error(
            'outlier, ncut, attn, cam, parts and mask-head need more packages: pip install "l2r2-models[detect]".'
        ) from error
    return torch.from_numpy(label(mask.numpy())[0]).long()


def inside_view(view: ViewMap, image: Image, grid: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Find the cells of a grid over the view whose centers show the image and not its padding.

    Args:
        view: the mapping between image and view.
        image: the image.
        grid: `(rows, columns)`.

    Returns:
        `(start, end)` of the rows and of the columns; at least one of each.
    """
    x0, y0, x1, y1 = view.boxes_to_view(torch.tensor([0.0, 0, image.width, image.height])).tolist()

    def cells(start: float, end: float, side: int, count: int) -> tuple[int, int]:
        middles = [(i + 0.5) * side / count for i in range(count)]
        inside = [i for i, middle in enumerate(middles) if start <= middle < end] or [count // 2]
        return inside[0], inside[-1] + 1

    return cells(y0, y1, view.view_size[0], grid[0]), cells(x0, x1, view.view_size[1], grid[1])


def box_of(mask: Tensor, offset: tuple[int, int], grid: Sequence[int], view: ViewMap, image: Image) -> Detections:
    """Compute the box around a mask on a grid over the view.

    Args:
        mask: `[h, w]` bool, a window of the grid.
        offset: `(row, column)` of the window in the grid.
        grid: `(rows, columns)`.
        view: the mapping between image and view.
        image: the image.

    Returns:
        One box in pixels of the image with score 1; none for an empty mask.
    """
    found = Detections.from_mask(mask)
    if not len(found):
        return Detections.from_lists([], (image.height, image.width))
    top, left = offset
    cell = torch.tensor([view.view_size[1] / grid[1], view.view_size[0] / grid[0]]).repeat(2)
    return one_box(view.boxes_to_image((found.boxes[0] + torch.tensor([left, top, left, top])) * cell), 1.0, image)


def one_box(box: Tensor, score: float, image: Image) -> Detections:
    """Make `Detections` of one box `[4]` in pixels, clipped to the image; empty if it lies outside."""
    found = Detections(box[None].float().cpu(), torch.tensor([score]), (image.height, image.width))
    return found.usable().clipped()


def otsu(values: Tensor, bins: int = 256) -> float:
    """Compute the threshold that minimizes the variance within the two classes it separates (Otsu 1979)."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts = torch.histc(values.float(), bins, low, high).double()
    centers = torch.linspace(low, high, 2 * bins + 1, dtype=torch.double)[1::2]
    below, mass = counts.cumsum(0)[:-1], (counts * centers).cumsum(0)[:-1]
    above, rest = counts.sum() - below, (counts * centers).sum() - mass
    between = below * above * (mass / below.clamp(min=1) - rest / above.clamp(min=1)) ** 2
    return float(centers[between.argmax()])

"""Views at their own aspect ratio: how large each is, and batches of views of several sizes.

The views of a batch lie at the top left of one tensor that holds the largest of them; pixels beyond a view are NaN. A network
that does not know this fails visibly instead of seeing padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST_ASPECT = 4  # longer windows are compressed to this ratio, so that no batch needs more than four times the pixels of a square


def native_size(height: int, width: int, size: int, patch: int) -> tuple[int, int]:
    """The size of the view of a window: whole patches, at most as many as a square of side `size` has.

    Of the grids that round one axis down and the other up, the one with more patches and less distortion.

    Args:
        height, width: of the window in the image.
        size: side of the square in pixels, a multiple of `patch`.
        patch: side of a patch.

    Returns:
        `(height, width)` in pixels; the ratio is close to the window's.

    >>> native_size(400, 600, 224, 16), native_size(500, 500, 224, 16)
    ((176, 272), (224, 224))
    """
    most = (size // patch) ** 2
    aspect = min(max(height / width, 1 / MOST_ASPECT), MOST_ASPECT)
    rows, columns = math.sqrt(most * aspect), math.sqrt(most / aspect)
    low_rows, low_columns = (min(most, max(1, int(side + 1e-6))) for side in (rows, columns))
    grids = [
        (low_rows, max(1, min(most // low_rows, math.ceil(columns - 1e-6)))),
        (max(1, min(most // low_columns, math.ceil(rows - 1e-6))), low_columns),
    ]

    def score(grid: tuple[int, int]) -> tuple[float, int]:
        patches = grid[0] * grid[1]
        return round(math.log(patches) - abs(math.log(grid[0] / grid[1] / aspect)), 9), patches

    best = max(grids, key=score)
    return best[0] * patch, best[1] * patch


def pad_alike(views: Sequence[Tensor]) -> list[Tensor]:
    """Pad views `[..., h, w]` with NaN at the right and bottom to the size of the largest; those of one size stay as they are."""
    if len({view.shape[-2:] for view in views}) <= 1:
        return list(views)
    height, width = (max(view.shape[axis] for view in views) for axis in (-2, -1))
    return [pad(view, (0, width - view.shape[-1], 0, height - view.shape[-2]), value=math.nan) for view in views]


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """`torch.stack` of views that may have several sizes, see `pad_alike`.

    >>> stack_views([torch.zeros(3, 2, 4), torch.zeros(3, 4, 2)]).shape
    torch.Size([2, 3, 4, 4])
    """
    return torch.stack(pad_alike(views))


def cat_views(views: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of batches of views that may have several sizes, see `pad_alike`."""
    return torch.cat(pad_alike(views))

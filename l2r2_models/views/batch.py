"""Cut views from a normalized batch, for a model that gets no original images (`model(x, boxes)`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from l2r2_kernels import roi_views
from l2r2_kernels.roi_views.reference import integer_boxes
from torch import Tensor

from ..errors import L2R2Error
from .spec import ViewSpec


def batch_views(x: Tensor, boxes: Tensor, spec: ViewSpec, branches: Sequence[str]) -> dict[str, Tensor]:
    """Cut the views of all branches from a normalized batch.

    Args:
        x: `[B, C, H, W]` normalized images, at the size of the first branch; views of other branches are larger or smaller as
            their sizes are.
        boxes: see `cut_batch`.
        spec: see `cut_batch`.
        branches: the branches of the model, in order.

    Returns:
        Views `[B, C, H', W']`, a mask if fg is masked inside the network, and `has_fg` `[B]` bool, by the argument names of
        `L2R2.forward_views`.

    Raises:
        L2R2Error: when the boxes are not `[B, 4]`, or the model's views keep their aspect ratio.
    """
    if spec.patch:
        raise L2R2Error("Views at their own aspect ratio are cut from images, not from a batch; use make_views or Predictor.")
    views: dict[str, Tensor] = {}
    for branch in branches:
        shown = branch
        if branch == "fg" and spec.fg.in_network:
            views["mask"] = batch_masks(x, boxes)[0]
            shown = "full"
        size = _scaled(x, spec.size_of(branch), spec.size_of(branches[0]))
        view, views["has_fg"] = cut_batch(x, boxes, spec, shown, size)
        if shown == branch or "full" not in branches:
            views[branch] = view
    return views


def _scaled(x: Tensor, side: int, side_of_x: int) -> tuple[int, int]:
    height, width = x.shape[2], x.shape[3]
    return (height, width) if side == side_of_x else (round(height * side / side_of_x), round(width * side / side_of_x))


def cut_batch(
    x: Tensor, boxes: Tensor, spec: ViewSpec, branch: str, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Cut the views of a branch from a normalized batch; differentiable in `x`.

    Args:
        x: `[B, C, H, W]` normalized images; the fill color is 0, their mean.
        boxes: `[B, 4]` xyxy in pixels of `x`; a NaN row has no box.
        spec: only its fg mode, margin, square and interpolation are used.
        branch: `full`, `fg` or `bg`. There are no masks, so the box is the object.
        size: `(height, width)` of the views; by default those of `x`.

    Returns:
        Views `[B, C, height, width]`, and `has_fg` `[B]` bool; a row without a box shows the whole image.

    Raises:
        L2R2Error: when the boxes are not `[B, 4]`.

    >>> views, has_fg = cut_batch(torch.rand(2, 3, 8, 8), torch.tensor([[0.0, 0, 4, 4], [torch.nan] * 4]), ViewSpec(), "fg")
    >>> views.shape, has_fg
    (torch.Size([2, 3, 8, 8]), tensor([ True, False]))
    """
    window, has_fg = _windows(x, boxes)
    batch, channels, height, width = x.shape
    size = (height, width) if size is None else size
    if branch == "bg" or (branch == "fg" and spec.fg.erases):
        inside = rectangles(window, height, width)[:, None]
        erased = inside if branch == "bg" else ~inside
        x = torch.where(erased & has_fg[:, None, None, None], torch.zeros_like(x), x)
    crops = branch == "fg" and spec.fg.crops
    if not crops and size == (height, width):
        return x, has_fg
    whole = boxes.new_tensor([0, 0, width, height]).expand(batch, 4)
    where = torch.where(has_fg[:, None], boxes.to(whole), whole) if crops else whole
    three = channels == 3  # the kernel takes three channels; other inputs are cut one channel at a time
    views, _ = roi_views(
        x if three else x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1),
        where if three else where.repeat_interleave(channels, 0),
        size=size,
        margin=spec.margin,
        square=spec.square and crops,
        fill=(0.0, 0.0, 0.0),
        interpolation=spec.interpolation,
        dtype=x.dtype,
    )
    if not three:
        views = views[:, 0].unflatten(0, (batch, channels))
    return views, has_fg


def batch_masks(x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the boxes of a batch into masks, for an fg that is masked inside the network.

    Args:
        x: `[B, C, H, W]` images.
        boxes: `[B, 4]` xyxy in pixels of `x`; a NaN row has no box.

    Returns:
        Masks `[B, H, W]` bool, True everywhere in a row without a box, and `has_fg` `[B]` bool.

    Raises:
        L2R2Error: when the boxes are not `[B, 4]`.
    """
    window, has_fg = _windows(x, boxes)
    return rectangles(window, x.shape[2], x.shape[3]) | ~has_fg[:, None, None], has_fg


def _windows(x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Integer boxes `[B, 4]` in a batch, and which of them contain a pixel."""
    batch, _, height, width = x.shape  # not len(x), which export would fix
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.shape[0] != batch:
        raise L2R2Error(f"boxes must be [B, 4] = [{batch}, 4], got {list(boxes.shape)}.")
    window, valid = integer_boxes(boxes, boxes.new_full((batch,), height), boxes.new_full((batch,), width), 0.0)
    return window, valid


def rectangles(windows: Tensor, height: int, width: int) -> Tensor:
    """`[V, H, W]` bool, True inside each integer box."""
    rows = torch.arange(height, device=windows.device)[None, :, None]
    columns = torch.arange(width, device=windows.device)[None, None, :]
    x0, y0, x1, y1 = (end[:, None, None] for end in windows.unbind(1))
    return (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)

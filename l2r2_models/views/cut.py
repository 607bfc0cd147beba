"""Cut the branches' views from images and boxes, as a serialized `ViewSpec` defines. No other module cuts views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from l2r2_kernels import roi_views
from l2r2_kernels.roi_views.reference import integer_boxes
from torch import Tensor

from ..boxes.detections import Detections, ViewMap
from ..errors import L2R2Error
from .batch import rectangles
from .native import native_size
from .patches import Patches
from .spec import ViewSpec

if TYPE_CHECKING:
    from PIL.Image import Image


class Views(NamedTuple):
    """The views of V boxes, by branch.

    An fg that is masked inside the network sees `full`; `fg` is then the whole image, and only made if `full` is not requested.
    Where `has_fg` is False, the fg view shows the whole image, so that the batch contains only real images.

    Attributes:
        full: normalized views `[V, 3, S, S]`, or None if not requested; likewise `fg` and `bg`, each at its own size. At their
            own aspect ratio (`ViewSpec.patch`), `[V, 3, H, W]` of the largest, with NaN beyond each view.
        fg: see `full`.
        bg: see `full`.
        has_fg: `[V]` bool, whether an object was found.
        mask: for an fg that is masked inside the network, `[V, S, S]`: how much of each pixel of `full` the object covers, in
            [0, 1].
    """

    full: Tensor | None
    fg: Tensor | None
    bg: Tensor | None
    has_fg: Tensor
    mask: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """The tensors that are not None, by the argument names of `L2R2.forward_views`."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def make_views(
    images: Sequence[Image | Tensor | Patches],
    boxes: Tensor | None,
    spec: ViewSpec,
    *,
    branches: Sequence[str] = ("full", "fg"),
    image_index: Tensor | None = None,
    masks: Sequence[Tensor | None] | None = None,
    device: torch.device | str | None = None,
) -> Views:
    """Cut the views of every box from the original images (`docs/method.md`, Views).

    Args:
        images: upright RGB images, PIL or uint8 tensors `[H, W, 3]`, of any sizes; or `Patches` for these boxes.
        boxes: `[V, 4]` xyxy pixels of the original image; a NaN row has no box. None: no image has a box.
        spec: how to cut.
        branches: which views to make.
        image_index: `[V]` int64, the image of each box; by default box i belongs to image i.
        masks: V masks `[H, W]` bool (True on the object) or None.
        device: where to cut (default: where the images are).

    Returns:
        Views of V rows. `has_fg` is False for a row without a usable box, or whose mask is empty (for `masked_crop`: inside the
        crop); see `docs/method.md`, Fallback. With fg mode `parts`, boxes and masks are not used and every row is True.

    Raises:
        L2R2Error: when boxes, index or masks do not match the images.

    >>> image = torch.zeros(30, 40, 3, dtype=torch.uint8)
    >>> views = make_views([image], torch.tensor([[5.0, 5.0, 20.0, 25.0]]), ViewSpec(size=8))
    >>> views.full.shape, views.fg.shape, views.has_fg
    (torch.Size([1, 3, 8, 8]), torch.Size([1, 3, 8, 8]), tensor([True]))
    """
    pixels = [image if isinstance(image, Patches) else _pixels(image).to(device) for image in images]
    place = pixels[0].device if pixels and isinstance(pixels[0], Tensor) else torch.device("cpu")
    if boxes is not None and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise L2R2Error(f"boxes must be [V, 4], got {list(boxes.shape)}.")
    index = torch.arange(len(pixels), device=place) if image_index is None else image_index.to(place)
    rows = len(index) if boxes is None else len(boxes)
    if image_index is None and rows != len(pixels):
        raise L2R2Error(f"Got {rows} boxes for {len(pixels)} images; pass image_index, the image of each box.")
    if rows == 0:
        raise L2R2Error("There is no image to cut views from; pass at least one.")
    if image_index is not None:
        _check_index(image_index, rows, len(pixels))
    of_image = torch.tensor([p.size if isinstance(p, Patches) else p.shape[:2] for p in pixels], device=place)
    sizes = of_image[index]  # [V, 2] height, width
    boxes = torch.full((rows, 4), float("nan"), device=place) if boxes is None else boxes.to(place, torch.float32)
    keep = _object_masks(masks, sizes)

    in_network = "fg" in branches and spec.fg.in_network
    _, has_fg = integer_boxes(boxes, sizes[:, 0], sizes[:, 1], 0.0)
    if keep is not None:
        seen = integer_boxes(boxes, sizes[:, 0], sizes[:, 1], spec.margin)[0] if spec.fg.crops and spec.fg.erases else None
        has_fg = has_fg & _not_empty(keep, seen, place)
    whole = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], 1).float()
    boxes = torch.where(has_fg[:, None], boxes, whole)  # no box: the whole image
    objects = _Objects(boxes, sizes, has_fg, keep)
    parts: dict[str, _Part] = {}
    if "full" in branches:
        parts["full"] = _whole_images(of_image)  # once per image, however many boxes it has
    if in_network and "full" not in branches:
        parts["fg"] = _Part(whole, index)
    if "fg" in branches and not in_network:
        where = boxes if spec.fg.crops else whole
        parts["fg"] = _Part(where, index, objects.kept() if spec.fg.erases else None)
    if "bg" in branches:
        parts["bg"] = _Part(whole, index, objects.erased(boxes_only=spec.bg == "box"))
    if any(isinstance(image, Patches) for image in pixels):
        views = _cut_patches(pixels, parts, spec, device)  # type: ignore[arg-type]
        has_fg, index, whole = has_fg.to(device), index.to(device), whole.to(device)
    else:
        views = _cut(pixels, parts, spec)  # type: ignore[arg-type]
    if image_index is not None and "full" in views:
        views["full"] = views["full"][index]
    mask = None
    if in_network and spec.fg.finds_object:
        has_fg = torch.ones_like(has_fg)  # the network finds the object itself
    elif in_network:
        mask = _cut_masks([kept.to(whole.device) for kept in objects.kept()], whole, spec)
    return Views(views.get("full"), views.get("fg"), views.get("bg"), has_fg, mask)


def view_map(branch: str, spec: ViewSpec, image_size: tuple[int, int], box: Tensor | None = None) -> ViewMap:
    """Return the mapping between an image and a view that `make_views` cuts from it.

    Args:
        branch: `full`, `fg` or `bg`.
        spec: how it is cut.
        image_size: `(height, width)`.
        box: `[4]` xyxy pixels of the object. If None, or if the box contains no pixel of the image, the view shows the whole
            image.
    """
    window = (0, 0, image_size[1], image_size[0])
    if branch == "fg" and spec.fg.crops and box is not None:
        (cut,), (found,) = Detections(box[None].float().cpu(), torch.ones(1), image_size).windows(spec.margin)
        window = tuple(cut.tolist()) if found else window
    size = (spec.size_of(branch),) * 2
    if spec.patch:
        size = native_size(window[3] - window[1], window[2] - window[0], size[0], spec.patch)
    return ViewMap(window, size, spec.square)


def mask_in_full_view(mask: Tensor, spec: ViewSpec) -> Tensor:
    """Cut an object mask `[H, W]` bool as the full view is cut: `[S, S]` in [0, 1], 0 in the padding.

    >>> mask_in_full_view(torch.tensor([[True, False]]), ViewSpec(size=2, square=False))
    tensor([[1., 0.],
            [1., 0.]])
    """
    whole = torch.tensor([[0.0, 0.0, mask.shape[1], mask.shape[0]]], device=mask.device)
    return _cut_masks([mask], whole, spec)[0]


class _Part(NamedTuple):
    """What to cut for one branch: `[V, 4]` boxes, `[V]` image indices, V masks (True where a pixel is kept) or None.

    `windows` `[V, 4]` are the boxes in the image, where the pixels are only a part of it.
    """

    boxes: Tensor
    images: Tensor
    masks: list[Tensor] | None = None
    windows: Tensor | None = None

    def rows(self, index: list[int]) -> _Part:
        """The part with these rows only."""
        return _Part(self.boxes[index], self.images[index], None if self.masks is None else [self.masks[i] for i in index])


def _cut(pixels: list[Tensor], parts: Mapping[str, _Part], spec: ViewSpec) -> dict[str, Tensor]:
    """Cut all parts, those of one size in one kernel launch."""
    if spec.patch:
        return _cut_native(pixels, parts, spec)
    by_size: dict[int, dict[str, _Part]] = {}
    for branch, part in parts.items():
        by_size.setdefault(spec.size_of(branch), {})[branch] = part
    found: dict[str, Tensor] = {}
    for size, of_size in by_size.items():
        found.update(_cut_alike(pixels, of_size, spec, size))
    return found


def _cut_native(pixels: list[Tensor], parts: Mapping[str, _Part], spec: ViewSpec) -> dict[str, Tensor]:
    """Cut all parts at the aspect ratio of each window, those of one size in one kernel launch."""
    by_size: dict[tuple[int, int], dict[str, list[int]]] = {}
    for branch, part in parts.items():
        windows = part.windows
        if windows is None:
            height, width = (torch.tensor([p.shape[axis] for p in pixels])[part.images.cpu()] for axis in (0, 1))
            windows, _ = integer_boxes(part.boxes.cpu(), height, width, spec.margin)
        for row, (x0, y0, x1, y1) in enumerate(windows.tolist()):
            size = native_size(y1 - y0, x1 - x0, spec.size_of(branch), spec.patch)
            by_size.setdefault(size, {}).setdefault(branch, []).append(row)
    found: dict[str, Tensor] = {}
    for branch, part in parts.items():
        most = [max(size[axis] for size, rows in by_size.items() if branch in rows) for axis in (0, 1)]
        found[branch] = torch.full((len(part.boxes), 3, *most), torch.nan, device=part.boxes.device)
    for size, rows in by_size.items():
        cut = _cut_alike(pixels, {branch: parts[branch].rows(index) for branch, index in rows.items()}, spec, size)
        for branch, views in cut.items():
            found[branch][rows[branch], :, : size[0], : size[1]] = views
    return found


def _cut_alike(
    pixels: list[Tensor], parts: Mapping[str, _Part], spec: ViewSpec, size: int | tuple[int, int]
) -> dict[str, Tensor]:
    """Cut parts of one size; the margin does not change whole images, because boxes are clipped."""
    masks: list[Tensor | None] = []
    for part in parts.values():
        masks += part.masks or [None] * len(part.boxes)
    views, _ = roi_views(
        [p.permute(2, 0, 1) if len(p) == 3 else p for p in pixels],  # the kernel would read a 3-pixel-high image as [3, H, W]
        torch.cat([part.boxes for part in parts.values()]),
        torch.cat([part.images for part in parts.values()]),
        masks=None if all(mask is None for mask in masks) else masks,
        size=size,
        margin=spec.margin,
        square=spec.square,
        fill=spec.fill,
        interpolation=spec.interpolation,
        mode=spec.mode,
        mean=spec.mean,
        std=spec.std,
    )
    return dict(zip(parts, views.split([len(part.boxes) for part in parts.values()])))


def _cut_patches(
    images: list[Patches], parts: Mapping[str, _Part], spec: ViewSpec, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Cut all parts from patches, each of which covers one view."""
    if not parts:
        return {}
    if any(part.masks is not None for part in parts.values()):
        raise L2R2Error("Views with replaced pixels cannot be cut from patches; pass whole images.")
    shown = [images[i] for part in parts.values() for i in part.images.tolist()]
    sizes = torch.tensor([image.size for image in shown])
    windows, _ = integer_boxes(torch.cat([part.boxes for part in parts.values()]), sizes[:, 0], sizes[:, 1], spec.margin)
    pixels = [_sent(_of_window(image, window), device) for image, window in zip(shown, windows.tolist())]
    ends = _whole_images(torch.tensor([p.shape[:2] for p in pixels], device=device))
    counts = [len(part.boxes) for part in parts.values()]
    split = (ends.boxes.split(counts), ends.images.split(counts), [None] * len(counts), windows.split(counts))
    return _cut(pixels, dict(zip(parts, map(_Part, *split))), spec)


def _of_window(image: Patches, window: Sequence[int]) -> Tensor:
    try:
        return image.parts[tuple(window)]  # type: ignore[index]
    except KeyError:
        raise L2R2Error(f"The patches of this image are for other boxes; none covers the window {window}.") from None


def _sent(pixels: Tensor, device: torch.device | str | None) -> Tensor:
    """Return the pixels on the device; copies to a GPU are asynchronous, through pinned memory."""
    if device is None or torch.device(device).type != "cuda":
        return pixels.to(device)
    return pixels.pin_memory().to(device, non_blocking=True)


def _cut_masks(masks: list[Tensor], whole: Tensor, spec: ViewSpec) -> Tensor:
    """Cut object masks `[H, W]` bool like whole images: `[V, S, S]` in [0, 1], 0 in the padding."""
    plain = replace(spec, fill=(0, 0, 0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear")
    pixels = [mask[..., None].to(torch.uint8).mul(255).expand(-1, -1, 3).contiguous() for mask in masks]
    part = _Part(whole, torch.arange(len(pixels), device=whole.device))
    return _cut(pixels, {"full": part}, plain)["full"][:, 0].clamp(0, 1)


def _whole_images(sizes: Tensor) -> _Part:
    """Return the part that shows whole images of sizes `[N, 2]` (height, width)."""
    ends = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], 1)
    return _Part(ends.float(), torch.arange(len(sizes), device=sizes.device))


class _Objects(NamedTuple):
    """The object of each row: its mask, or else its box; empty where `has_fg` is False."""

    boxes: Tensor
    sizes: Tensor
    has_fg: Tensor
    masks: list[Tensor | None] | None

    def kept(self, boxes_only: bool = False) -> list[Tensor]:
        """`[H, W]` bool per row, True on the object, or everywhere if nothing was found."""
        windows, _ = integer_boxes(self.boxes, self.sizes[:, 0], self.sizes[:, 1], 0.0)
        given = [None] * len(windows) if self.masks is None or boxes_only else self.masks
        return [
            mask if mask is not None and found else rectangles(window[None], height, width)[0]
            for mask, found, window, (height, width) in zip(given, self.has_fg.tolist(), windows, self.sizes.tolist())
        ]

    def erased(self, boxes_only: bool) -> list[Tensor]:
        """`[H, W]` bool per row, False on the object, or True everywhere if nothing was found.

        With `boxes_only` it is False on the smallest rectangle that contains box and mask.
        """
        kept, found = self.kept(boxes_only), self.has_fg.tolist()
        if boxes_only and self.masks is not None:  # the erased box must cover the whole object
            kept = [keep if mask is None else _tight(keep | mask) for keep, mask in zip(kept, self.masks)]
        return [~keep if has else torch.ones_like(keep) for keep, has in zip(kept, found)]


def _pixels(image: Image | Tensor) -> Tensor:
    if not isinstance(image, Tensor):
        if image.mode != "RGB":
            raise L2R2Error(f"An image must be RGB, got {image.mode}; open it with load_image.")
        from ..images import image_tensor

        return image_tensor(image)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise L2R2Error(f"An image tensor must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}.")
    return image


def _check_index(index: Tensor, rows: int, images: int) -> None:
    if index.shape != (rows,) or index.is_floating_point() or index.dtype == torch.bool:
        raise L2R2Error(f"image_index must be {rows} integers, one per box, got {index.dtype} {list(index.shape)}.")
    if index.min() < 0 or index.max() >= images:
        raise L2R2Error(f"image_index must lie in 0..{images - 1}, got {int(index.min())}..{int(index.max())}.")


def _object_masks(masks: Sequence[Tensor | None] | None, sizes: Tensor) -> list[Tensor | None] | None:
    if masks is None:
        return None
    if len(masks) != len(sizes):
        raise L2R2Error(f"Got {len(masks)} masks for {len(sizes)} boxes; pass one mask (or None) per box.")
    for row, (mask, size) in enumerate(zip(masks, sizes.tolist())):
        if mask is not None and list(mask.shape) != size:
            raise L2R2Error(f"Mask {row} is {list(mask.shape)}, but its image is {size}.")
    return [None if m is None else m.to(sizes.device).bool() for m in masks]


def _not_empty(masks: Sequence[Tensor | None], windows: Tensor | None, device: torch.device) -> Tensor:
    """`[V]` bool: whether each mask contains a pixel, inside its window if there are windows; True without a mask."""
    parts = list(masks)
    if windows is not None:
        parts = [None if m is None else m[y0:y1, x0:x1] for m, (x0, y0, x1, y1) in zip(masks, windows.tolist())]
    return torch.stack([torch.ones((), dtype=torch.bool, device=device) if m is None else m.any() for m in parts])


def _tight(mask: Tensor) -> Tensor:
    """The smallest rectangle around a mask `[H, W]`, as a mask."""
    rows, columns = (mask.any(axis).long() for axis in (1, 0))
    inside = [ends.cumsum(0).bool() & ends.flip(0).cumsum(0).flip(0).bool() for ends in (rows, columns)]
    return inside[0][:, None] & inside[1][None]

"""`roi_views`: the public function, its custom ops, and the choice of implementation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import add_op_namespace_prefix, no_autocast
from . import cpu, reference
from .source import RaggedImages, Source, from_batch, from_list, from_ragged
from .spec import Spec, make_spec

BACKENDS = ("", "reference", "cpu", "triton")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SPEC = (
    "int height, int width, float margin, bool square, float[] fill, str interpolation, bool antialias, str mode, "
    "float[] mean, float[] std, float scale, ScalarType dtype, bool channels_last, str backend"
)
_VIEWS = f"Tensor boxes, Tensor image_index, Tensor[] masks, int[] mask_views, {_SPEC}"


def roi_views(
    images: Sequence[Tensor] | RaggedImages | Tensor,
    boxes: Tensor,
    image_index: Tensor | None = None,
    *,
    masks: Sequence[Tensor | None] | None = None,
    size: int | Sequence[int] = 224,
    margin: float = 0.0,
    square: bool = True,
    fill: float | Sequence[float] = (124, 116, 104),
    interpolation: str = "bilinear",
    antialias: bool = True,
    mode: str = "float",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cut, mask, pad, resize and normalize views of images in one pass, from decoded images and boxes to network input.

    Per view: the box grows by `margin`, is rounded outwards (floor / ceil) and clipped to its image; the crop is taken,
    masked pixels become `fill`, the crop is padded to a centered square with `fill` and resized. A box that is not finite or
    has no pixel inside the image gives a view of `fill` and `valid` False.

    Args:
        images: list of uint8 tensors [3, H, W] or [H, W, 3] of any sizes (if ambiguous, [3, H, W]),
            `RaggedImages` (the same in one buffer, which saves the host a loop over the images), or one batch [B, 3, H, W],
            uint8 or floating. All on one device. A floating batch receives gradients; a non-finite pixel in it may spread
            over its tile of outputs.
        boxes: [V, 4] xyxy in absolute pixels of the view's image, exclusive end; a NaN row means no box.
        image_index: [V] integers, the image of each view; None if there is one view per image, in order. An index out of
            range is an error on the CPU and an invalid view on CUDA, where checking would stall the stream.
        masks: None, or one entry per view: None or bool / uint8 [H, W] of that view's image; nonzero keeps the pixel. A wrong
            size is an error on the CPU; on CUDA, pixels beyond the mask are kept.
        size: output side, or (height, width).
        margin: margin added to the box at each end, relative to its side.
        square: pad the crop to a square before the resize; False stretches it.
        fill: color of padding and masked pixels, in the units of the input.
        interpolation, antialias: "bilinear" or "bicubic", as `F.interpolate` defines them.
        mode: "float" equals `F.interpolate` in float on the padded canvas; "pil" equals Pillow's resize of it bit for bit
            (uint8 images, square output, antialias).
        mean, std, scale: normalized = (x / scale - mean) / std; scale None is 255 for uint8 and 1 for floating images.
        dtype, memory_format: dtype and memory format of the views.
        backend: None chooses by device (CUDA: Triton, CPU: the CPU path, else the reference); or "reference", "cpu", "triton".

    Returns:
        views [V, 3, height, width] and valid, bool [V].

    Raises:
        TypeError: when an argument has the wrong type; the message names it.
        ValueError: when an argument has an invalid value; the message names it.
    """
    source = None
    if isinstance(images, RaggedImages):
        count, is_uint8, device = _check_ragged(images)
        source = from_ragged(images) if _at_once(images.pixels, backend) else None
    elif isinstance(images, Tensor):
        count, is_uint8, device = _check_batch(images)
    else:
        if isinstance(images, (list, tuple)) and images and _at_once(images[0], backend):
            source = from_list(images)  # None: an error is reported below
        count, is_uint8, device = _check_list(images) if source is None else (source.images, True, source.pixels.device)
    spec = make_spec(
        is_uint8=is_uint8, size=size, margin=margin, square=square, fill=fill, interpolation=interpolation,
        antialias=antialias, mode=mode, mean=mean, std=std, scale=scale, dtype=dtype, memory_format=memory_format,
    )  # fmt: skip
    boxes, image_index = _check_boxes(boxes, image_index, count, device)
    present, mask_views = _check_masks(masks, boxes.shape[0], device)
    _check_backend(backend, device, spec)
    rest = (boxes, image_index, present, mask_views, *spec, backend or "")
    if source is not None and _choose(backend or "", device, torch.uint8, spec) == "triton":
        from . import triton as kernels

        return kernels.forward(source, boxes, image_index, present, mask_views, spec)
    cut: tuple[Tensor, Tensor]
    if isinstance(images, RaggedImages):
        cut = _packed_op(*images, *rest)
    else:
        cut = _batch_op(images, *rest) if isinstance(images, Tensor) else _ragged_op(images, *rest)
    return cut


def _at_once(first: Tensor, backend: str | None) -> bool:
    """Return whether Triton is called without the operator, which costs the host time for each image of a list."""
    chosen = backend == "triton" or (not backend and isinstance(first, Tensor) and first.is_cuda)
    return chosen and type(first) is Tensor and not torch.compiler.is_compiling()


def _check_backend(backend: str | None, device: torch.device, spec: Spec) -> None:
    if (backend or "") not in BACKENDS:
        raise ValueError(f'roi_views: backend must be one of {", ".join(BACKENDS[1:])} or None, got "{backend}"')
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f'roi_views: backend "cpu" needs images on the CPU, got {device}')
    if backend in ("cpu", "triton") and spec.dtype == torch.float64:
        raise TypeError('roi_views: dtype float64 needs backend "reference"')


def _check_ragged(images: RaggedImages) -> tuple[int, bool, torch.device]:
    pixels, places = images.pixels, images.places
    if pixels.dim() != 1 or pixels.dtype != torch.uint8 or not pixels.is_contiguous():
        raise ValueError(f"roi_views: images.pixels must be contiguous uint8 [bytes], got {pixels.dtype} {tuple(pixels.shape)}")
    if places.dim() != 2 or places.shape[1] != 3 or places.dtype != torch.int64 or places.device != pixels.device:
        found = f"{places.dtype} {tuple(places.shape)} on {places.device}"
        raise ValueError(f"roi_views: images.places must be int64 [B, 3] on {pixels.device}, got {found}")
    return places.shape[0], True, pixels.device


def _check_batch(images: Tensor) -> tuple[int, bool, torch.device]:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"roi_views: images must be [B, 3, H, W] when given as one tensor, got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"roi_views: images must be uint8 or floating, got {images.dtype}")
    return images.shape[0], images.dtype == torch.uint8, images.device


def _check_list(images: Sequence[Tensor]) -> tuple[int, bool, torch.device]:
    if not isinstance(images, Sequence):
        found = type(images).__name__
        raise TypeError(f"roi_views: images must be a list of uint8 tensors or one batch tensor, got {found}")
    device = images[0].device if len(images) and isinstance(images[0], Tensor) else torch.device("cpu")
    for image in images:
        if not isinstance(image, Tensor) or image.dtype is not torch.uint8:
            found = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"roi_views: images must be a list of uint8 tensors or one batch tensor, got {found} in the list")
        shape = image.shape
        if len(shape) != 3 or (shape[0] != 3 and shape[2] != 3):
            raise ValueError(f"roi_views: images must be [3, H, W] or [H, W, 3], got {tuple(shape)} in the list")
        if image.device != device:
            raise ValueError(f"roi_views: images must be on one device, got {device} and {image.device}")
    return len(images), True, device


def _check_boxes(boxes: Tensor, image_index: Tensor | None, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4:
        found = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
        raise ValueError(f"roi_views: boxes must be [V, 4], got {found}")
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise TypeError(f"roi_views: boxes must be numbers, got {boxes.dtype}")
    boxes = boxes.detach().to(device, torch.float32, non_blocking=True)
    if image_index is None:
        if boxes.shape[0] != count:
            raise ValueError(f"roi_views: image_index is needed when there are {boxes.shape[0]} boxes for {count} images")
        return boxes, torch.arange(count, device=device)
    if not isinstance(image_index, Tensor):
        raise TypeError(f"roi_views: image_index must be a tensor of integers, got {type(image_index).__name__}")
    if image_index.shape != boxes.shape[:1] or image_index.dtype not in INTEGERS:
        raise ValueError(
            f"roi_views: image_index must be {boxes.shape[0]} integers, got {image_index.dtype} {tuple(image_index.shape)}"
        )
    return boxes, image_index.to(device, torch.int64, non_blocking=True)


def _check_masks(masks: Sequence[Tensor | None] | None, views: int, device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Return the masks that are not None, as uint8, and [-1, view of each].

    Autograd of an op supports neither a list with None nor, besides a list of tensors, an empty list of integers.
    """
    if masks is None:
        return [], [-1]
    if len(masks) != views:
        raise ValueError(f"roi_views: masks must have one entry per view ({views}), got {len(masks)}")
    present: list[Tensor] = []
    of_view = [-1]
    for view, mask in enumerate(masks):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.uint8):
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"roi_views: masks must be bool or uint8 tensors, got {found}")
        if mask.dim() != 2:
            raise ValueError(f"roi_views: masks must be [H, W] each, got {tuple(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"roi_views: masks must be on the device of images, got {mask.device} and {device}")
        present.append(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
        of_view.append(view)
    return present, of_view


def _per_view(masks: Sequence[Tensor], mask_views: Sequence[int], views: int) -> list[Tensor | None]:
    spread: list[Tensor | None] = [None] * views
    for view, mask in zip(mask_views[1:], masks):
        spread[view] = mask
    return spread


def _choose(backend: str, device: torch.device, dtype: torch.dtype, spec: Spec) -> str:
    if backend:
        return backend
    if torch.float64 in (dtype, spec.dtype) or device.type not in ("cpu", "cuda"):
        return "reference"
    return "triton" if device.type == "cuda" else "cpu"


def _compute_dtype(dtype: torch.dtype, spec: Spec) -> torch.dtype:
    return torch.float64 if torch.float64 in (dtype, spec.dtype) else torch.float32


def _source(images: Sequence[Tensor] | RaggedImages | Tensor) -> Source | None:
    if isinstance(images, RaggedImages):
        return from_ragged(images)
    return from_batch(images) if isinstance(images, Tensor) else from_list(images)


def _run(
    images: Sequence[Tensor] | RaggedImages | Tensor, boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor],
    mask_views: Sequence[int], spec: Spec, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    first = images if isinstance(images, Tensor) else (images[0] if len(images) else boxes)
    chosen = _choose(backend, first.device, first.dtype, spec)
    if chosen == "triton":
        from . import triton as kernels

        return kernels.forward(_source(images), boxes, image_index, masks, mask_views, spec)
    each: Iterable[Tensor] = images.images() if isinstance(images, RaggedImages) else images
    of_view = _per_view(masks, mask_views, boxes.shape[0])
    with no_autocast(first.device):
        if chosen == "cpu":
            return cpu.forward(each, boxes, image_index, of_view, spec)
        return reference.forward(each, boxes, image_index, of_view, spec, _compute_dtype(first.dtype, spec))


def _empty_views(like: Tensor, boxes: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    shape = (boxes.shape[0], 3, spec.height, spec.width)
    views = torch.empty(shape, dtype=spec.dtype, device=like.device, memory_format=spec.memory_format)
    return views, torch.empty(boxes.shape[:1], dtype=torch.bool, device=like.device)


@torch.library.custom_op(
    add_op_namespace_prefix("roi_views_ragged"), mutates_args=(), schema=f"(Tensor[] images, {_VIEWS}) -> (Tensor, Tensor)"
)
def _ragged_op(
    images: Sequence[Tensor], boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], *spec: Any
) -> tuple[Tensor, Tensor]:
    return _run(images, boxes, image_index, masks, mask_views, Spec(*spec[:-1]), spec[-1])


@_ragged_op.register_fake
def _(
    images: Sequence[Tensor], boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], *spec: Any
) -> tuple[Tensor, Tensor]:
    return _empty_views(boxes, boxes, Spec(*spec[:-1]))


@torch.library.custom_op(
    add_op_namespace_prefix("roi_views_packed"),
    mutates_args=(),
    schema=f"(Tensor pixels, Tensor places, SymInt max_height, SymInt max_width, {_VIEWS}) -> (Tensor, Tensor)",
)
def _packed_op(
    pixels: Tensor, places: Tensor, max_height: int, max_width: int, boxes: Tensor, image_index: Tensor,
    masks: Sequence[Tensor], mask_views: Sequence[int], *spec: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    images = RaggedImages(pixels, places, max_height, max_width)
    return _run(images, boxes, image_index, masks, mask_views, Spec(*spec[:-1]), spec[-1])


@_packed_op.register_fake
def _(
    pixels: Tensor, places: Tensor, max_height: int, max_width: int, boxes: Tensor, image_index: Tensor,
    masks: Sequence[Tensor], mask_views: Sequence[int], *spec: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_views(boxes, boxes, Spec(*spec[:-1]))


@torch.library.custom_op(
    add_op_namespace_prefix("roi_views_batch"), mutates_args=(), schema=f"(Tensor images, {_VIEWS}) -> (Tensor, Tensor)"
)
def _batch_op(
    images: Tensor, boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], *spec: Any
) -> tuple[Tensor, Tensor]:
    return _run(images, boxes, image_index, masks, mask_views, Spec(*spec[:-1]), spec[-1])


@_batch_op.register_fake
def _(
    images: Tensor, boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int], *spec: Any
) -> tuple[Tensor, Tensor]:
    return _empty_views(images, boxes, Spec(*spec[:-1]))


@torch.library.custom_op(
    add_op_namespace_prefix("roi_views_backward"), mutates_args=(), schema=f"(Tensor grad, Tensor images, {_VIEWS}) -> Tensor"
)
def _backward_op(
    grad: Tensor, images: Tensor, boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int],
    *settings: Any,
) -> Tensor:  # fmt: skip
    spec, backend = Spec(*settings[:-1]), str(settings[-1])
    if _choose(backend, images.device, images.dtype, spec) == "triton":
        from . import triton as kernels

        return kernels.backward(grad, images, boxes, image_index, masks, mask_views, spec)
    of_view = _per_view(masks, mask_views, boxes.shape[0])
    compute = _compute_dtype(images.dtype, spec)
    with no_autocast(images.device):
        return reference.backward(grad, images.shape, boxes, image_index, of_view, spec, compute).to(images.dtype)


@_backward_op.register_fake
def _(
    grad: Tensor, images: Tensor, boxes: Tensor, image_index: Tensor, masks: Sequence[Tensor], mask_views: Sequence[int],
    *settings: Any,
) -> Tensor:  # fmt: skip
    return torch.empty(images.shape, dtype=images.dtype, device=images.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, boxes, image_index, masks, mask_views, *spec = inputs
    ctx.save_for_backward(images, boxes, image_index, *masks)
    ctx.mask_views, ctx.spec = mask_views, spec
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_valid: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    images, boxes, image_index, *masks = ctx.saved_tensors
    grad_images = None
    if ctx.needs_input_grad[0]:
        grad_images = _backward_op(grad, images, boxes, image_index, masks, ctx.mask_views, *ctx.spec)
    return grad_images, None, None, [None] * len(masks), None, *[None] * len(ctx.spec)


_batch_op.register_autograd(_backward, setup_context=_setup_context)

"""Compare roi_views with its peers: 256 uint8 images of about 500 x 400 -> 512 views of 224 x 224, bfloat16, one GPU.

``rows(device, copy_bytes_per_s, matmul_flops_per_s)`` is called by ``kernels.py``; ``timing.py`` documents the
rows. Every provider is compared with the float64 reference on a few views before it is timed. The
time of a call includes the work of the host for which the GPU has to wait.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from l2r2_kernels import RaggedImages, roi_views
from l2r2_kernels.roi_views import reference
from l2r2_kernels.roi_views.spec import make_spec
from timing import Case, Goal, timed
from torch import Tensor

FILL, MEAN, STD = (124, 116, 104), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKED = 4  # views compared with float64
# Tolerance in levels of 255. Peers that sample instead of antialiasing compute something else; for them, only NaN and a wrong
# shape are errors.
EXACT, SAMPLED = 0.8, 255.0


class Sizes(NamedTuple):
    """Problem sizes: images of height x width, with two views each."""

    images: int = 256
    height: int = 400
    width: int = 500
    size: int = 224
    repeats: int = 50
    copies: int = 2


TINY = Sizes(images=3, height=40, width=50, size=24, repeats=2)


class Work(NamedTuple):
    """One batch: ragged or same-size images, the boxes of its views, and the image of each."""

    images: list[Tensor] | RaggedImages | Tensor
    boxes: Tensor
    index: Tensor
    host_boxes: list[list[int]]


def rows(device: str, copy_bytes_per_s: float, matmul_flops_per_s: float, sizes: Sizes | None = None) -> Iterator[dict]:
    """All cases of the goal table on one device; ``sizes`` makes them smaller, for a dry run."""
    sizes = sizes or Sizes()
    where = torch.device(device)
    for case in _cases(where, sizes, copy_bytes_per_s):
        yield from case.rows(copy_bytes_per_s, matmul_flops_per_s)


def make_work(sizes: Sizes, ragged: bool, seed: int, device: torch.device, square: bool = False) -> Work:
    """Fresh noise images (HWC), each with a view of the whole and one of a box of half its sides."""
    g = torch.Generator().manual_seed(seed)
    height = sizes.width if square else sizes.height
    shapes = [(height, sizes.width)] * sizes.images
    if ragged:
        jitter = torch.randint(-sizes.height // 5, sizes.height // 5 + 1, (sizes.images, 2), generator=g).tolist()
        shapes = [(height + dy, sizes.width + dx) for dy, dx in jitter]
    boxes = []
    for h, w in shapes:
        x, y = (int(torch.randint(0, side // 2, (1,), generator=g)) for side in (w, h))
        boxes += [[0, 0, w, h], [x, y, x + w // 2, y + h // 2]]
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, device=device) for h, w in shapes]
    index = torch.arange(sizes.images, device=device).repeat_interleave(2)
    stacked = images if ragged else torch.stack(images).permute(0, 3, 1, 2)
    return Work(stacked, torch.tensor(boxes, dtype=torch.float32, device=device), index, boxes)


def ours(work: Work, sizes: Sizes, **settings) -> Tensor:
    settings = {"mean": MEAN, "std": STD, "fill": FILL, "dtype": torch.bfloat16, **settings}
    return roi_views(work.images, work.boxes, work.index, size=sizes.size, **settings)[0]


def truth(work: Work, sizes: Sizes, **settings) -> Tensor:
    """The float64 reference of the first views."""
    spec = make_spec(
        is_uint8=True, size=sizes.size, margin=0.0, fill=FILL, antialias=True, mean=MEAN, std=STD, scale=None,
        dtype=torch.float64, memory_format=torch.contiguous_format,
        **{"square": True, "interpolation": "bilinear", "mode": "float", **settings},
    )  # fmt: skip
    images = [image.cpu() for image in work.images[:CHECKED]]
    index = work.index[:CHECKED].cpu()
    return reference.forward(images, work.boxes[:CHECKED].cpu(), index, [None] * CHECKED, spec)[0]


def levels_apart(views: Tensor, expected: Tensor) -> float:
    scale = 255 * torch.tensor(STD, dtype=torch.float64)[:, None, None]
    return float(((views.cpu().double() - expected) * scale).abs().max())


def _provider(function: Callable[[Work], Tensor], works: list[Work], expected: Tensor, tolerance: float):
    """(calls, check) of one provider for Case.add."""

    def check() -> bool:
        views = function(works[0])
        return bool(views.isfinite().all()) and levels_apart(views[:CHECKED], expected) <= tolerance  # NaN may be anywhere

    return [partial(function, work) for work in works], check


def _normalize(levels: Tensor) -> Tensor:
    mean, std = (torch.tensor(c, device=levels.device)[:, None, None] for c in (MEAN, STD))
    return ((levels.float() / 255 - mean) / std).to(torch.bfloat16)


# --- the peers ----------------------------------------------------------------------------------------------------------


def eager_chain(work: Work, sizes: Sizes) -> Tensor:
    """torchvision, one view after the other: crop, pad, resize, then normalize and cast the batch."""
    from torchvision.transforms.v2 import functional as T

    views = []
    for (x0, y0, x1, y1), i in zip(work.host_boxes, range(2 * len(work.images))):
        image = work.images[i // 2]
        crop = T.crop(image.permute(2, 0, 1) if image.shape[0] != 3 else image, y0, x0, y1 - y0, x1 - x0)
        height, width = crop.shape[1:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = T.pad(crop.float(), [left, top, side - width - left, side - height - top], fill=list(FILL))
        views.append(T.resize(square, [sizes.size, sizes.size], antialias=True))
    return _normalize(torch.stack(views))


def batched_chain(batch: Tensor, sizes: Sizes) -> Tensor:
    """Whole images of one size: one interpolate, normalize and cast; no boxes, no padding."""
    return _normalize(F.interpolate(batch.float(), size=(sizes.size, sizes.size), mode="bilinear", antialias=True))


def roi_align_chain(work: Work, sizes: Sizes) -> Tensor:
    """torchvision's roi_align (stretched, no antialias beyond its sampling) + normalize + cast."""
    from torchvision.ops import roi_align

    rois = torch.cat([work.index[:, None].float(), work.boxes], 1)
    return _normalize(roi_align(work.images.float(), rois, (sizes.size, sizes.size), sampling_ratio=2, aligned=True))


def kornia_chain(work: Work, sizes: Sizes) -> Tensor:
    """kornia's crop_and_resize (stretched, no antialias) + normalize + cast; it takes one box per image."""
    from kornia.geometry.transform import crop_and_resize

    x0, y0, x1, y1 = work.boxes.unbind(1)
    corners = torch.stack([torch.stack(c, 1) for c in ((x0, y0), (x1 - 1, y0), (x1 - 1, y1 - 1), (x0, y1 - 1))], 1)
    return _normalize(crop_and_resize(work.images.float()[work.index], corners, (sizes.size, sizes.size)))


# --- the goal table (KERNELS, section 1) --------------------------------------------------------------------------------


def _traffic(work: Work, sizes: Sizes) -> float:
    """Minimum traffic in bytes: every image read once, every view written once."""
    return sum(image.numel() for image in work.images) + len(work.boxes) * 3 * sizes.size**2 * 2


def _ragged_cases(device: torch.device, sizes: Sizes, copy_rate: float) -> Iterator[Case]:
    works = [make_work(sizes, True, seed, device) for seed in range(sizes.copies)]
    traffic = _traffic(works[0], sizes)
    for interpolation, share, stretch in (("bilinear", 0.4, 0.5), ("bicubic", 0.28, 0.35)):
        case = Case("roi_views", f"ragged {interpolation}", device, sizes.repeats, Goal(1.0, stretch / share), traffic, 0)
        function = partial(ours, sizes=sizes, interpolation=interpolation)
        expected = truth(works[0], sizes, interpolation=interpolation)
        case.add("l2r2", partial(_provider, function, works, expected, EXACT))
        case.stand_in(f"{share:.0%} of the copy rate", [1e3 * traffic / (share * copy_rate)])
        yield case
    case = Case("roi_views", "ragged against an eager chain", device, max(sizes.repeats // 10, 2), Goal(40, 80), traffic, 0)
    expected = truth(works[0], sizes)
    case.add("l2r2", partial(_provider, partial(ours, sizes=sizes), works, expected, EXACT))
    case.add("torchvision_eager", partial(_provider, partial(eager_chain, sizes=sizes), works, expected, EXACT))
    yield case
    case = Case("roi_views", "ragged pil", device, sizes.repeats, Goal(1.0, 0.8 / 0.6), traffic, 0)
    pil = truth(works[0], sizes, mode="pil")
    case.add("l2r2", partial(_provider, partial(ours, sizes=sizes, mode="pil"), works, pil, EXACT))
    case.stand_in("0.8 ms (H100)", [0.8])
    yield case
    # the host's part counts: every call waits for its result, and time is the caller's
    case = Case(
        "roi_views", "one buffer, synchronous caller", torch.device("cpu"), sizes.repeats, Goal(1.0, 0.35 / 0.25), traffic, 0
    )
    buffers = [w._replace(images=RaggedImages.pack(w.images)) for w in works]

    def waiting(work: Work) -> Tensor:
        views = ours(work, sizes)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return views

    case.add("l2r2", partial(_provider, waiting, buffers, expected, EXACT))
    case.stand_in("0.35 ms (H100)", [0.35])
    yield case


def _same_size_cases(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    works = [make_work(sizes, False, seed, device) for seed in range(sizes.copies)]
    traffic, expected = _traffic(works[0], sizes), truth(works[0], sizes, square=False)
    for peer, chain, goal in (("roi_align", roi_align_chain, Goal(2, 3)), ("kornia", kornia_chain, Goal(3, 5))):
        case = Case("roi_views", f"same-size boxes, stretched, {peer}", device, sizes.repeats, goal, traffic, 0)
        case.add("l2r2", partial(_provider, partial(ours, sizes=sizes, square=False), works, expected, EXACT))
        case.add(peer, partial(_provider, partial(chain, sizes=sizes), works, expected, SAMPLED))
        yield case
    whole = [make_work(sizes, False, seed, device, square=True) for seed in range(sizes.copies)]
    whole = [w._replace(boxes=w.boxes[::2], index=w.index[::2], host_boxes=w.host_boxes[::2]) for w in whole]
    case = Case("roi_views", "same-size whole images", device, sizes.repeats, Goal(5, 8), _traffic(whole[0], sizes), 0)
    expected = truth(whole[0], sizes)
    case.add("l2r2", partial(_provider, partial(ours, sizes=sizes), whole, expected, EXACT))
    peers: dict[str, Callable[..., Tensor]] = {"batched": batched_chain}
    if device.type == "cuda":
        peers["compiled"] = torch.compile(batched_chain, dynamic=False)
    for name, chain in peers.items():
        case.add(name, partial(_provider, lambda w, chain=chain: chain(w.images, sizes), whole, expected, EXACT))
    yield case


def _backward_case(device: torch.device, sizes: Sizes) -> Case:
    shape = (sizes.images, 3, sizes.width, sizes.width)
    g = torch.Generator(device=device).manual_seed(0)
    batches = [torch.rand(shape, generator=g, device=device).requires_grad_() for _ in range(sizes.copies)]
    grad = torch.randn(sizes.images, 3, sizes.size, sizes.size, generator=g, device=device)
    box = torch.tensor([[0.0, 0, sizes.width, sizes.width]], device=device).expand(sizes.images, 4)
    index = torch.arange(sizes.images, device=device)

    def views(x: Tensor) -> Tensor:
        return roi_views(x, box, index, size=sizes.size, fill=0.5)[0]

    def torch_views(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(sizes.size, sizes.size), mode="bilinear", antialias=True)

    def provider(function: Callable[[Tensor], Tensor]):
        outs = [function(x) for x in batches]
        calls = [partial(torch.autograd.grad, out, x, grad, retain_graph=True) for out, x in zip(outs, batches)]

        def check() -> bool:
            x = batches[0][:CHECKED].detach().cpu().double().requires_grad_()
            exact = torch.autograd.grad(torch_views(x), x, grad[:CHECKED].cpu().double())[0]
            return torch.allclose(calls[0]()[0][:CHECKED].cpu().double(), exact, rtol=1e-3, atol=1e-4)

        return calls, check

    traffic = 4 * (batches[0].numel() + grad.numel())
    case = Case("roi_views", "backward, float32 batch", device, sizes.repeats, Goal(2.2), traffic, 0)
    case.add("l2r2", partial(provider, views))
    case.add("torch_antialias", partial(provider, torch_views))
    return case


def _cases(device: torch.device, sizes: Sizes, copy_rate: float) -> Iterator[Case]:
    yield from _ragged_cases(device, sizes, copy_rate)
    yield from _same_size_cases(device, sizes)
    yield _backward_case(device, sizes)


# --- choosing the launch table: python benchmarks/speed/roi_views_bench.py ------------------------------------------------


def sweep(sizes: Sizes | None = None) -> None:
    """Time other tile shapes than the launch table's on the ragged case; a wrong result is printed as such."""
    from l2r2_kernels.roi_views import triton as launch
    from triton.runtime.errors import OutOfResources

    sizes = sizes or Sizes()
    device = torch.device("cuda")
    works = [make_work(sizes, True, seed, device) for seed in range(sizes.copies)]
    expected = truth(works[0], sizes)
    chosen = launch.uint8_config
    tiles = itertools.product((16, 32, 64), (32, 64), (16, 32), (1, 2, 4), (None, 96, 128, 168))
    for block_h, block_w, chunk_y, warps, registers in tiles:
        tile = {"BLOCK_H": block_h, "BLOCK_W": block_w, "CHUNK_Y": chunk_y, "num_warps": warps, "maxnreg": registers}
        launch.uint8_config = lambda *args, tile=tile: {**chosen(*args), **tile}
        calls, check = _provider(partial(ours, sizes=sizes), works, expected, EXACT)
        try:
            result = f"{sorted(timed(calls, device, sizes.repeats))[sizes.repeats // 2]:.3f} ms" if check() else "wrong"
        except OutOfResources:
            result = "does not fit"
        print(tile, result, flush=True)
    launch.uint8_config = chosen


if __name__ == "__main__":
    if torch.cuda.is_available():
        sweep()
    else:
        print("No CUDA device: there is nothing to sweep here.")

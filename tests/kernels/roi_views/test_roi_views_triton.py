"""The Triton kernels: on the GPU with -m gpu, or in Triton's interpreter with TRITON_INTERPRET=1 (small cases of the same
tests, run by test_kernels_interpreter.py in a process of their own)."""

import ctypes
import mmap
import os

import pytest
import torch
from l2r2_kernels import RaggedImages, roi_views
from l2r2_kernels.roi_views import op, source
from roi_views_cases import FILL, MEAN, NAN, STD, TOLERANCE, levels_apart, noise_image, spec_of, truth

pytest.importorskip("triton")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICES = [pytest.param("cpu", id="interpreter")]
on_devices = pytest.mark.parametrize("device", DEVICES)
KINDS = [("bilinear", True), ("bicubic", True), ("bilinear", False), ("bicubic", False)]


def grown(n, device):
    """Interpreter sizes are small; the GPU gets ten times as many pixels a side."""
    return n if device == "cpu" else 10 * n


def some_images(device):
    sizes = [(50, 40), (33, 61), (9, 70)]
    images = [noise_image(grown(h, device), grown(w, device), seed=h, hwc=i == 1) for i, (h, w) in enumerate(sizes)]
    boxes = torch.tensor([[3.0, 4, 30, 50], [0, 0, 61, 33], [0, 0, 70, 9], [NAN] * 4, [10.2, 3.7, 22, 9]])
    return [image.to(device) for image in images], (boxes * grown(1, device)).to(device), torch.tensor([0, 1, 2, 2, 1])


def triton_views(images, boxes, index=None, **settings):
    return roi_views(images, boxes, index, backend="triton", **settings)


@on_devices
@pytest.mark.parametrize("interpolation, antialias", KINDS)
def test_float32(device, interpolation, antialias):
    images, boxes, index = some_images(device)
    settings = {"size": grown(20, device), "interpolation": interpolation, "antialias": antialias, "mean": MEAN, "std": STD}
    views, valid = triton_views(images, boxes, index, **settings)
    expected, expected_valid = truth(images, boxes, index, **settings)
    assert torch.equal(valid.cpu(), expected_valid)
    assert levels_apart(views, expected, STD) <= TOLERANCE[torch.float32]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interpolation, antialias", KINDS[:2])
def test_half_precision(device, interpolation, antialias, dtype):
    images, boxes, index = some_images(device)
    size = (grown(18, device), grown(20, device))
    settings = {"size": size, "interpolation": interpolation, "antialias": antialias, "mean": MEAN, "std": STD}
    views, _ = triton_views(images, boxes, index, dtype=dtype, **settings)
    # The interpreter truncates to bfloat16 where the GPU rounds: up to half a unit (0.45 of a level here) more.
    truncation = 0.45 if device == "cpu" and dtype == torch.bfloat16 else 0.0
    assert views.dtype == dtype
    assert levels_apart(views, truth(images, boxes, index, **settings)[0], STD) <= TOLERANCE[dtype] + truncation


@on_devices
@pytest.mark.parametrize("square", [True, False])
def test_boxes_at_every_border_and_of_one_pixel(device, square):
    image = noise_image(30, 44, seed=3).to(device)
    boxes = torch.tensor(
        [
            [0, 0, 44, 30], [0, 0, 20, 15], [20, 15, 44, 30], [-5, 9, 12, 40], [15, -2, 50, 15], [43, 29, 44, 30],
            [0, 0, 0.5, 0.5], [60, 0, 70, 9], [0, 5, 44, 6], [7, 0, 8, 30], [-3e38, 0, 3e38, 9], [20, 5, 10, 9],
            [5.2, 5.2, 5.2, 5.2], [10.6, 10.2, 10.4, 10.9],
        ],
        device=device,
    )  # fmt: skip
    index = torch.zeros(len(boxes), dtype=torch.int64)
    settings = {"size": 16, "square": square, "margin": 0.05}
    views, valid = triton_views([image], boxes, index, **settings)
    expected, expected_valid = truth([image], boxes, index, **settings)
    assert torch.equal(valid.cpu(), expected_valid)
    assert levels_apart(views, expected) <= 0.01


@on_devices
def test_a_very_tall_image_in_float_and_pil_mode(device):
    height = grown(120, device)
    image = noise_image(height, 2, seed=8).to(device)
    boxes = torch.tensor([[0, 0, 2, height]], device=device)
    for mode, tolerance in (("float", 0.01), ("pil", 1e-4)):
        views, _ = triton_views([image], boxes, size=16, mode=mode)
        assert levels_apart(views, truth([image], boxes, size=16, mode=mode)[0]) <= tolerance


@on_devices
@pytest.mark.parametrize("mode", ["float", "pil"])
def test_masks_and_memory_format(device, mode):
    images, boxes, index = some_images(device)
    sizes = [image.shape[1:] if image.shape[0] == 3 else image.shape[:2] for image in images]
    g = torch.Generator().manual_seed(0)
    masks = [(torch.rand(sizes[i], generator=g) > 0.5).to(device) for i in index]
    masks[1] = masks[1].t().contiguous().t()  # any strides
    masks[2] = None
    settings = {"size": grown(18, device), "mode": mode}
    last, _ = triton_views(images, boxes, index, masks=masks, memory_format=torch.channels_last, **settings)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert levels_apart(last, truth(images, boxes, index, masks, **settings)[0]) <= (0.01 if mode == "float" else 1e-4)


@on_devices
@pytest.mark.parametrize(
    "layout, masked, dtype, interpolation",
    [
        ("packed", False, torch.float16, "bilinear"),
        ("packed", True, torch.float32, "bicubic"),
        ("planar", True, torch.float16, "bilinear"),
        ("planar", False, torch.float32, "bicubic"),
        ("mixed", True, torch.float16, "bilinear"),
    ],
)
def test_words_of_packed_and_planar_images(device, layout, masked, dtype, interpolation):
    """Every alignment of a row, windows of every length, loops of windows, and rows shorter than a window."""
    sizes = [(11, 19), (13, 34), (9, 67), (9, 5), (30, 17)]
    images = [
        noise_image(h, w, seed=h, hwc=layout == "packed" or (layout == "mixed" and i % 2 == 0)).to(device)
        for i, (h, w) in enumerate(sizes)
    ]
    boxes = torch.tensor([[0, 0, w, h] for h, w in sizes] + [[7, 3, 34, 13], [60, 0, 67, 9]], device=device)
    index = torch.tensor([0, 1, 2, 3, 4, 1, 2])
    masks = None
    if masked:
        g = torch.Generator().manual_seed(1)
        masks = [(torch.rand(sizes[i], generator=g) > 0.4).to(device) for i in index]
        masks[2] = None
    settings = {"size": 11, "interpolation": interpolation}
    views, _ = triton_views(images, boxes, index, masks=masks, dtype=dtype, **settings)
    assert levels_apart(views, truth(images, boxes, index, masks, **settings)[0]) <= TOLERANCE[dtype]


@on_devices
@pytest.mark.parametrize("mode", ["float", "pil"])
def test_nothing_outside_an_image_or_mask_is_read(device, mode):
    """Both lie between pages that may not be touched: reading one stops the process."""
    if device != "cpu":
        pytest.skip("pages are protected on the CPU")
    height, width = 12, 37
    boxes = torch.tensor([[0, 0, width, height], [30, 5, width, height]], device=device)
    index = torch.zeros(2, dtype=torch.int64)
    for hwc in (True, False):
        for at_end in (True, False) if mode == "float" else (True,):
            image, mask = guarded(noise_image(height, width, seed=3, hwc=hwc), at_end), guarded(MASK, at_end)
            views, _ = triton_views([image], boxes, index, masks=[mask, None], size=5, mode=mode)
            expected = truth([image], boxes, index, [mask, None], size=5, mode=mode)[0]
            assert levels_apart(views, expected) <= 0.01


MASK = (torch.rand(12, 37, generator=torch.Generator().manual_seed(2)) > 0.5).to(torch.uint8)


def guarded(tensor, at_end):
    """A copy that ends (or starts) at a page which may not be read."""
    page = mmap.PAGESIZE
    room = -(-tensor.numel() // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    start = page + (room - tensor.numel() if at_end else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=tensor.numel(), offset=start).view(tensor.shape).copy_(tensor)


@on_devices
@pytest.mark.parametrize("mode, dtype", [("float", torch.float32), ("pil", torch.float16)])
def test_images_in_one_buffer_are_as_a_list(device, mode, dtype):
    images = [noise_image(h, w, seed=h, hwc=i != 1) for i, (h, w) in enumerate([(21, 19), (9, 5), (18, 30)])]
    boxes = torch.tensor([[0, 0, 19, 21], [0, 0, 5, 9], [2.5, 3, 30, 18], [NAN] * 4], device=device)
    index, settings = torch.tensor([0, 1, 2, 2]), {"size": 8, "mode": mode, "dtype": dtype}
    ragged = RaggedImages.pack([image.to(device) for image in images])
    views, valid = triton_views(ragged, boxes, index, **settings)
    expected, expected_valid = triton_views([image.to(device) for image in images], boxes, index, **settings)
    assert torch.equal(views, expected) and torch.equal(valid, expected_valid)


@on_devices
def test_a_list_is_inspected_once_and_its_addresses_every_time(device):
    boxes = torch.tensor([[0.0, 0, 20, 16]] * 2, device=device)
    for seed in (1, 2):  # the same shapes and other memory
        images = [noise_image(16, 20, seed=seed, hwc=True).to(device), noise_image(16, 20, seed=seed + 5).to(device)]
        views, _ = triton_views(images, boxes, size=8)
        assert levels_apart(views, truth(images, boxes, size=8)[0]) <= 0.01
    assert source._known.cache_info().hits
    with pytest.raises(ValueError, match=r"roi_views: images must be \[3, H, W\] or \[H, W, 3\], got \(8, 9\) in the list"):
        triton_views([images[0], torch.zeros(8, 9, dtype=torch.uint8, device=device)], boxes)


@on_devices
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pil_mode_is_the_reference_bit_for_bit(device, interpolation):
    images, boxes, index = some_images(device)
    settings = {"size": grown(20, device), "mode": "pil", "interpolation": interpolation}
    views, valid = triton_views(images, boxes, index, **settings)
    expected, expected_valid = roi_views([i.cpu() for i in images], boxes.cpu(), index, backend="cpu", **settings)
    assert torch.equal(valid.cpu(), expected_valid)
    assert torch.equal((views.cpu() * 255).round(), (expected * 255).round())


@on_devices
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_batches(device, layout):
    batch = torch.stack([noise_image(24, 30, seed=s) for s in range(2)]).to(device)
    if layout == "channels_last":
        batch = batch.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        batch = batch[:, :, ::2, 3:]
    boxes = torch.tensor([[2.0, 1, 25, 12], [4, 0, 9, 9]], device=device)
    expected, _ = truth(batch, boxes, size=17)
    assert levels_apart(triton_views(batch, boxes, size=17)[0], expected) <= 0.01
    settings = {"size": 17, "fill": [f / 255 for f in FILL]}
    for dtype, out, tolerance in ((torch.float32, torch.float32, 0.01), (torch.float16, torch.float16, 0.35)):
        images = (batch / 255).to(dtype)
        views, _ = triton_views(images, boxes, dtype=out, **settings)
        assert levels_apart(views, truth(images, boxes, **settings)[0]) <= tolerance


@pytest.fixture
def poison_empty(monkeypatch):
    """A call after which torch.empty gives memory full of NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

    return lambda: monkeypatch.setattr(torch, "empty", poisoned)


@on_devices
@pytest.mark.parametrize("mode", ["float", "pil"])
def test_every_output_is_written(device, mode, poison_empty, monkeypatch):
    images, boxes, index = some_images(device)
    settings = {"size": grown(17, device), "mode": mode}
    poison_empty()
    views, valid = triton_views(images, boxes, index, **settings)
    monkeypatch.undo()
    expected, expected_valid = truth(images, boxes, index, **settings)
    assert torch.equal(valid.cpu(), expected_valid)
    assert levels_apart(views, expected) <= 0.01


@on_devices
def test_every_gradient_is_written(device, poison_empty):
    batch = torch.rand(3, 3, 21, 37, device=device, requires_grad=True)  # image 1 has no view, image 2 an invalid one
    boxes = torch.tensor([[3.0, 4, 9, 8], [NAN] * 4], device=device)
    views, _ = triton_views(batch, boxes, torch.tensor([0, 2]), size=8, square=False, fill=0.5)
    poison_empty()
    views.sum().backward()
    assert batch.grad.isfinite().all() and not batch.grad[1:].any()
    assert batch.grad[0, :, 4:8, 3:9].sum() > 0.9 * 3 * 8 * 8 and not batch.grad[0, :, 8:].any()


@on_devices
def test_an_image_index_out_of_range_gives_an_invalid_view(device):
    image = noise_image(20, 20, seed=1).to(device)
    boxes = torch.tensor([[0.0, 0, 20, 20]], device=device).repeat(3, 1)
    for images in ([image], image[None]):
        views, valid = triton_views(images, boxes, torch.tensor([-1, 0, 7]), size=16)
        assert valid.tolist() == [False, True, False]
        expected = (torch.tensor(FILL, device=device) / 255)[:, None, None].expand(3, 16, 16)
        torch.testing.assert_close(views[0], expected)
        torch.testing.assert_close(views[2], expected)


@on_devices
@pytest.mark.parametrize("interpolation, antialias, square", [*((*kind, True) for kind in KINDS), ("bicubic", True, False)])
def test_backward_is_the_reference_and_repeats_bitwise(device, interpolation, antialias, square):
    g = torch.Generator().manual_seed(4)
    batch = torch.rand(2, 3, 21, 27, generator=g).to(device)
    boxes = torch.tensor([[3.0, 4, 27, 19], [0, 0, 27, 21], [10, 8, 14, 20], [NAN] * 4, [0, 0, 9, 9]], device=device)
    index = torch.tensor([1, 0, 1, 1, 0])
    mask = torch.rand(21, 27, generator=g) > 0.5
    grad = torch.randn(5, 3, 18, 13, generator=g)
    results = []
    for backend, where in (("triton", device), ("triton", device), ("reference", "cpu")):
        x = batch.detach().to(where, copy=True).requires_grad_()  # a leaf of its own each time
        views, _ = roi_views(
            x, boxes.to(where), index, masks=[None, mask.to(where), None, None, None], size=(18, 13), square=square, fill=0.4,
            interpolation=interpolation, antialias=antialias, std=0.5, backend=backend,
        )  # fmt: skip
        views.backward(grad.to(where))
        results.append(x.grad.cpu().clone())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=2e-5)


@on_devices
def test_backward_of_an_expanded_gradient_in_half_precision(device):
    batch = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    batch = batch.to(device, torch.float16).detach().requires_grad_()
    boxes = torch.tensor([[0.0, 0, 20, 20]], device=device)
    triton_views(batch, boxes, size=10)[0].sum().backward()  # the gradient of sum has strides 0
    plain = batch.detach().cpu().float().requires_grad_()
    roi_views(plain, boxes.cpu(), size=10, backend="reference")[0].sum().backward()
    torch.testing.assert_close(batch.grad.float().cpu(), plain.grad, rtol=2e-3, atol=2e-3)


@on_devices
def test_opcheck(device):
    images = [noise_image(9, 12, seed=1).to(device), noise_image(8, 7, seed=2, hwc=True).to(device)]
    boxes, index = torch.tensor([[1.0, 0, 7, 6]], device=device), torch.tensor([1], device=device)
    spec = spec_of(images, size=5)
    torch.library.opcheck(op._ragged_op, (images, boxes, index, [], [-1], *spec, "triton"))
    ragged = RaggedImages.pack(images)
    torch.library.opcheck(op._packed_op, (*ragged, boxes, index, [], [-1], *spec, "triton"), test_utils="test_faketensor")
    batch = torch.rand(2, 3, 7, 8, device=device, requires_grad=True)
    spec = spec_of(batch, size=5, fill=0.5)
    torch.library.opcheck(op._batch_op, (batch, boxes, index, [], [-1], *spec, "triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_thousands_of_crops_in_pil_mode_are_pillow(interpolation):
    g = torch.Generator().manual_seed(11)
    images = [noise_image(90 + 7 * s, 400 - 5 * s, seed=s, hwc=s % 2 == 0) for s in range(60)]
    index = torch.arange(60).repeat_interleave(50)
    sizes = torch.tensor([i.shape[1:] if i.shape[0] == 3 else i.shape[:2] for i in images])[index].flip(1)
    corners = (torch.rand(3000, 2, 2, generator=g) * (sizes[:, None] + 1)).sort(dim=1).values
    boxes = corners.reshape(3000, 4)
    settings = {"size": 32, "mode": "pil", "interpolation": interpolation}
    views, _ = roi_views([i.cuda() for i in images], boxes.cuda(), index, **settings)
    expected, _ = roi_views(images, boxes, index, **settings)
    assert ((views.cpu() * 255).round() != (expected * 255).round()).sum() == 0


@pytest.mark.gpu
def test_the_host_never_waits_for_the_gpu():
    images, boxes, index = some_images("cuda")
    batch = torch.rand(3, 3, 90, 90, device="cuda", requires_grad=True)
    index = index.cuda()
    for _ in range(2):  # the first round compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            for mode in ("float", "pil"):
                roi_views(images, boxes, index, mode=mode, dtype=torch.float16)
            roi_views(batch, boxes, index, fill=0.5)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_compile_with_inductor_on_the_gpu():
    images = torch.rand(3, 3, 90, 90, device="cuda")
    _, boxes, index = some_images("cuda")
    compiled = torch.compile(lambda x: roi_views(x, boxes, index.cuda(), size=32, fill=0.5)[0] * 2, fullgraph=True)
    torch.testing.assert_close(compiled(images), roi_views(images, boxes, index, size=32, fill=0.5)[0] * 2)

"""The public function: arguments, errors, gradients, and how it behaves under opcheck, compile and export."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from l2r2_kernels import roi_views
from l2r2_kernels.roi_views import cpu, op
from roi_views_cases import FILL, MEAN, NAN, STD, levels_apart, noise_image, spec_of, truth

BOXES = torch.tensor([[1.3, 2.0, 20.0, 15.5], [0, 0, 24, 18], [NAN] * 4, [5, 5, 6, 6]])
INDEX = torch.tensor([1, 0, 0, 1])


def float_batch(dtype=torch.float32, seed=0):
    return torch.rand(2, 3, 18, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_mask(seed=1):
    return torch.rand(18, 24, generator=torch.Generator().manual_seed(seed)) > 0.4


IMAGE = torch.zeros(3, 8, 9, dtype=torch.uint8)
BOX = torch.tensor([[0.0, 0, 5, 5]])


@pytest.mark.parametrize(
    "images, boxes, settings, error, message",
    [
        ([IMAGE], torch.zeros(1, 5), {}, ValueError, "roi_views: boxes must be [V, 4], got (1, 5)"),
        ([IMAGE], BOX > 3, {}, TypeError, "roi_views: boxes must be numbers, got torch.bool"),
        ([IMAGE], [[0, 0, 5, 5]], {}, ValueError, "roi_views: boxes must be [V, 4], got list"),
        ([IMAGE], BOX.repeat(2, 1), {}, ValueError, "roi_views: image_index is needed when there are 2 boxes for 1 images"),
        ([IMAGE], BOX, {"image_index": torch.zeros(1)}, ValueError, "roi_views: image_index must be 1 integers"),
        ([IMAGE], BOX, {"image_index": torch.tensor([3])}, ValueError, "roi_views: image_index must lie in 0..0, got 3..3"),
        ([IMAGE], BOX, {"image_index": [0]}, TypeError, "roi_views: image_index must be a tensor of integers, got list"),
        (None, BOX, {}, TypeError, "roi_views: images must be a list of uint8 tensors or one batch tensor, got NoneType"),
        (IMAGE.numpy(), BOX, {}, TypeError, "roi_views: images must be a list of uint8 tensors or one batch tensor, got ndarray"),
        ([IMAGE.float()], BOX, {}, TypeError, "roi_views: images must be a list of uint8 tensors or one batch tensor"),
        ([IMAGE[0]], BOX, {}, ValueError, "roi_views: images must be [3, H, W] or [H, W, 3], got (8, 9)"),
        (IMAGE, BOX, {}, ValueError, "roi_views: images must be [B, 3, H, W] when given as one tensor, got (3, 8, 9)"),
        (IMAGE[None].int(), BOX, {}, TypeError, "roi_views: images must be uint8 or floating, got torch.int32"),
        ([IMAGE], BOX, {"masks": []}, ValueError, "roi_views: masks must have one entry per view (1), got 0"),
        ([IMAGE], BOX, {"masks": [torch.ones(8, 9)]}, TypeError, "roi_views: masks must be bool or uint8 tensors"),
        ([IMAGE], BOX, {"masks": [torch.ones(1, 8, 9).bool()]}, ValueError, "roi_views: masks must be [H, W] each"),
        ([IMAGE], BOX, {"masks": [torch.ones(8, 8).bool()]}, ValueError, "roi_views: masks must have their image's size (8, 9)"),
        ([IMAGE], BOX, {"size": 0}, ValueError, "roi_views: size must be a positive int or (height, width), got 0"),
        ([IMAGE], BOX, {"size": 8.0}, ValueError, "roi_views: size must be a positive int or (height, width), got 8.0"),
        ([IMAGE], BOX, {"margin": None}, ValueError, "roi_views: margin must be a finite number >= 0, got None"),
        ([IMAGE], BOX, {"mean": "grey"}, ValueError, "roi_views: mean must be one finite number or three (R, G, B), got 'grey'"),
        ([IMAGE], BOX, {"margin": -0.1}, ValueError, "roi_views: margin must be a finite number >= 0, got -0.1"),
        ([IMAGE], BOX, {"fill": (1, 2)}, ValueError, "roi_views: fill must be one finite number or three (R, G, B)"),
        ([IMAGE], BOX, {"std": 0.0}, ValueError, "roi_views: std must be > 0, got 0.0"),
        ([IMAGE], BOX, {"scale": 0}, ValueError, "roi_views: scale must be a finite number > 0, got 0"),
        ([IMAGE], BOX, {"interpolation": "area"}, ValueError, "roi_views: interpolation must be one of bilinear, bicubic"),
        ([IMAGE], BOX, {"mode": "pillow"}, ValueError, "roi_views: mode must be one of float, pil"),
        ([IMAGE], BOX, {"dtype": torch.int8}, TypeError, "roi_views: dtype must be float16, bfloat16, float32 or float64"),
        ([IMAGE], BOX, {"memory_format": torch.preserve_format}, ValueError, "roi_views: memory_format must be"),
        ([IMAGE], BOX, {"backend": "cuda"}, ValueError, "roi_views: backend must be one of reference, cpu, triton or None"),
        ([IMAGE], BOX, {"backend": "cpu", "dtype": torch.float64}, TypeError, "roi_views: dtype float64 needs backend"),
        (IMAGE[None].float(), BOX, {"mode": "pil"}, TypeError, 'roi_views: mode "pil" rounds to uint8 and so needs uint8 images'),
        ([IMAGE], BOX, {"mode": "pil", "square": False}, ValueError, 'roi_views: mode "pil" promises Pillow'),
        ([IMAGE], BOX, {"mode": "pil", "size": (4, 5)}, ValueError, 'roi_views: mode "pil" promises Pillow'),
        ([IMAGE], BOX, {"mode": "pil", "antialias": False}, ValueError, 'roi_views: mode "pil" needs antialias=True'),
        ([IMAGE], BOX, {"mode": "pil", "fill": 0.5}, ValueError, "roi_views: fill must be three whole numbers from 0 to 255"),
    ],
)
def test_errors_are_one_sentence_that_names_the_argument(images, boxes, settings, error, message):
    with pytest.raises(error) as caught:
        roi_views(images, boxes, **settings)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_one_number_stands_for_three_channels_and_tensors_are_accepted():
    spec = spec_of([IMAGE], fill=np.float32(7), mean=torch.tensor(MEAN), std=0.5, size=np.int64(9))
    assert (spec.height, spec.width) == (9, 9)
    assert spec.fill == (7.0, 7.0, 7.0) and spec.std == (0.5, 0.5, 0.5)
    assert spec.mean == pytest.approx(MEAN)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_gradcheck(interpolation, antialias, square):
    batch = float_batch(torch.float64).requires_grad_()
    masks = [a_mask(), None, None, None]

    def views(x):
        return roi_views(
            x, BOXES, INDEX, masks=masks, size=(5, 4), margin=0.1, square=square, fill=0.4, std=0.3, scale=2.0,
            interpolation=interpolation, antialias=antialias, dtype=torch.float64,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(views, batch, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_has_the_batch_dtype_and_is_torch_antialias_backward(dtype):
    batch = float_batch(dtype).requires_grad_()
    grad = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(3))
    roi_views(batch, torch.tensor([[0.0, 0, 18, 18]]), torch.tensor([1]), size=7)[0].backward(grad)
    plain = batch.detach()[1:, :, :, :18].float().requires_grad_()
    torch.nn.functional.interpolate(plain, size=7, mode="bilinear", antialias=True).backward(grad)
    assert batch.grad.dtype == dtype
    assert not batch.grad[0].any() and not batch.grad[1, :, :, 18:].any()
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(batch.grad[1, :, :, :18].float(), plain.grad[0], rtol=tolerance, atol=tolerance)


def op_arguments(images, masks=None, **settings):
    spec = spec_of(images, size=8, **settings)
    present, views = op._check_masks(masks, len(BOXES), torch.device("cpu"))
    return (images, BOXES, INDEX, present, views, *spec, "")


def test_opcheck():
    masks = [a_mask(), None, a_mask(2), None]
    ragged = [noise_image(18, 24, seed=1), noise_image(20, 30, seed=2, hwc=True)]
    torch.library.opcheck(op._ragged_op, op_arguments(ragged))
    torch.library.opcheck(op._ragged_op, op_arguments(ragged, mode="pil", memory_format=torch.channels_last))
    torch.library.opcheck(op._batch_op, op_arguments(float_batch().requires_grad_(), masks))
    torch.library.opcheck(op._batch_op, op_arguments(float_batch().requires_grad_(), dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    batch = float_batch()
    mask = a_mask()

    def views(x, boxes):
        return roi_views(x, boxes, INDEX, masks=[mask, None, None, None], size=9, fill=0.5, mean=MEAN, std=STD)[0] * 2

    compiled = torch.compile(views, fullgraph=True, backend=backend)
    results = []
    for function in (views, compiled):
        x = batch.clone().requires_grad_()
        out = function(x, BOXES)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_compile_a_ragged_list():
    images = [noise_image(18, 24, seed=1), noise_image(20, 30, seed=2)]
    compiled = torch.compile(lambda x, b: roi_views(x, b, INDEX, size=9), fullgraph=True, backend="aot_eager")
    views, valid = compiled(images, BOXES)
    expected, expected_valid = roi_views(images, BOXES, INDEX, size=9)
    assert torch.equal(views, expected) and torch.equal(valid, expected_valid)


def test_export_the_float_batch_form():
    class Views(torch.nn.Module):
        def forward(self, batch, boxes, index):
            return roi_views(batch, boxes, index, size=9, fill=0.5)

    inputs = (float_batch(), BOXES, INDEX)
    views_dim = torch.export.Dim("views", min=2, max=64)
    dynamic = {"batch": None, "boxes": {0: views_dim}, "index": {0: views_dim}}
    program = torch.export.export(Views(), inputs, dynamic_shapes=dynamic)
    other = (float_batch(seed=5), BOXES[:3], INDEX[:3])
    views, valid = program.module()(*other)
    expected, expected_valid = roi_views(*other, size=9, fill=0.5)
    assert torch.equal(views, expected) and torch.equal(valid, expected_valid)


def test_float64_and_the_reference_backend_agree_with_the_truth():
    images = [noise_image(18, 24, seed=1), noise_image(20, 30, seed=2)]
    expected, _ = truth(images, BOXES, INDEX, size=9, fill=FILL)
    double, _ = roi_views(images, BOXES, INDEX, size=9, dtype=torch.float64)
    single, _ = roi_views(images, BOXES, INDEX, size=9, backend="reference")
    assert double.dtype == torch.float64 and levels_apart(double, expected) < 1e-9
    assert single.dtype == torch.float32 and levels_apart(single, expected) < 0.01


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_and_default_dtype_change_nothing(backend):
    images, batch = [noise_image(18, 24, seed=1), noise_image(20, 30, seed=2, hwc=True)], float_batch().requires_grad_()

    def results():
        cpu._bands.cache_clear()
        cpu._scratch.buffers.clear()
        views = [roi_views(images, BOXES, INDEX, size=9, antialias=aa, backend=backend)[0] for aa in (True, False)]
        out = roi_views(batch, BOXES, INDEX, size=9, fill=0.5, backend=backend)[0]
        pil = roi_views(images, BOXES, INDEX, size=9, mode="pil", backend=backend)[0]
        return [*views, pil, out, torch.autograd.grad(out, batch, torch.ones_like(out))[0]]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, results()))
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            other = results()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(map(torch.equal, plain, other))


def test_inference_mode_then_training():
    cpu._bands.cache_clear()
    cpu._scratch.buffers.clear()
    with torch.inference_mode():
        inferred = roi_views(float_batch(), BOXES, INDEX, size=9, fill=0.5)[0]
    batch = float_batch().requires_grad_()
    views = roi_views(batch, BOXES, INDEX, size=9, fill=0.5)[0]
    views.sum().backward()
    assert torch.equal(views, inferred) and batch.grad.isfinite().all()


def test_a_second_derivative_is_refused():
    batch = float_batch().requires_grad_()
    views = roi_views(batch, BOXES, INDEX, size=9, fill=0.5)[0]
    (grad,) = torch.autograd.grad(views.square().sum(), batch, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_the_card_example_runs(capsys):
    card = (Path(__file__).parents[3] / "kernels" / "CARD.md").read_text()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert "torch.Size([3, 3, 224, 224]) tensor([True, True, True]" in capsys.readouterr().out

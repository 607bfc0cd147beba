"""The Triton kernels: on the GPU with -m gpu, or in Triton's interpreter with TRITON_INTERPRET=1 (the same tests, run by
test_kernels_interpreter.py in a process of their own)."""

import os

import pytest
import torch
from l2r2_kernels.masked_attention import key_index, masked_attention, run_masked
from l2r2_kernels.masked_attention import reference as ref
from masked_attention_helpers import check_masked, check_masked_poison, check_varlen, masks, qkv, run
from timm.models.vision_transformer import Block

pytest.importorskip("triton")
OPS = torch.ops.l2r2_kernels
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)]
if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICES = [pytest.param("cpu", id="interpreter")]
on_devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_devices
@pytest.mark.parametrize("name", ["some", "one", "none", "all"])
def test_masked(device, name):
    check_masked((2, 2, 64, 32), torch.float32, masks(2, 64)[name], device, "triton")


@on_devices
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_masked_half_precision(device, dtype):
    check_masked((2, 2, 64, 32), dtype, masks(2, 64)["some"], device, "triton")


@on_devices
@pytest.mark.parametrize("shape", [(2, 1, 61, 64), (1, 1, 1, 32), (1, 2, 37, 80), (1, 1, 130, 128)], ids=str)
def test_masked_odd_shapes(device, shape):
    check_masked(shape, torch.float32, masks(shape[0], shape[2])["some"], device, "triton")


@on_devices
@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.float32), (32, torch.float16), (32, torch.bfloat16), (80, torch.float32)])
def test_varlen(device, dim, dtype):
    check_varlen([13, 1, 0, 70], 1, dim, dtype, device, "triton", padding=9)


@on_devices
@pytest.mark.parametrize(("max_len", "padding"), [(1, 0), (33, 300)])
def test_varlen_is_right_whatever_max_len_and_padding_are(device, max_len, padding):
    check_varlen([100, 3], 1, 32, torch.float32, device, "triton", padding=padding, max_len=max_len)


@on_devices
def test_varlen_with_few_programs_a_segment(device, monkeypatch):
    """A full GPU gets as many programs as an ordinary segment has blocks; longer segments take several turns."""
    from l2r2_kernels.masked_attention import triton

    monkeypatch.setattr(triton, "_FULL_GRID", 0)
    check_varlen([150, 3, 20, 1], 1, 32, torch.float32, device, "triton", padding=40)


@on_devices
def test_nan_and_inf_in_masked_keys_go_nowhere(device):
    check_masked_poison(device, "triton")


@on_devices
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinite_gradients_leave_masked_keys_at_zero(device):
    q, k, v = qkv(1, 1, 20, 32, torch.float32, device)
    mask = masks(1, 20)["some"].to(device)
    grad = torch.full_like(q, float("inf"))
    _, _, dk, dv = run(lambda q, k, v: masked_attention(q, k, v, mask, backend="triton"), (q, k, v), grad)
    assert torch.all(dk[0, 0][~mask[0]] == 0) and torch.all(dv[0, 0][~mask[0]] == 0)


@on_devices
def test_the_gradient_of_key_weights(device):
    """Beside Triton's attention as beside PyTorch's own."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([Block(96, 2)]).to(device)
    x, mask = torch.randn(2, 20, 96, device=device), masks(2, 20)["some"].to(device)

    def step(backend):
        weight = mask.float().requires_grad_()
        out = run_masked(blocks, x, mask, key_weight=weight, backend=backend)
        return [out[:, 0], *torch.autograd.grad(out[:, 0].square().sum(), [weight, *blocks.parameters()])]

    for got, expected in zip(step("triton"), step("torch")):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@on_devices
def test_backward_is_bitwise_repeatable(device):
    q, k, v = qkv(1, 2, 70, 32, torch.float32, device)
    mask, grad = masks(1, 70)["some"].to(device), torch.randn_like(q)
    first, second = (run(lambda q, k, v: masked_attention(q, k, v, mask, backend="triton"), (q, k, v), grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


@on_devices
def test_contiguous_and_transposed_inputs_and_gradients_agree(device):
    q, k, v = (x.detach().contiguous().requires_grad_() for x in qkv(2, 2, 30, 32, torch.float32, device))
    odd = tuple(x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (q, k, v))
    mask = masks(2, 30)["some"].to(device)
    grad = torch.randn(2, 2, 1, 1, device=device).expand(2, 2, 30, 32)
    results = [run(lambda q, k, v: masked_attention(q, k, v, mask, backend="triton"), t, grad) for t in ((q, k, v), odd)]
    assert all(map(torch.equal, *results))


@on_devices
def test_lse_of_an_image_without_keys(device):
    q, k, v = qkv(2, 2, 20, 32, torch.float32, device)
    mask = masks(2, 20)["none"].to(device)
    _, lse = OPS.masked_attention(q, k, v, *key_index(mask, "triton"), 0.2, "triton")
    torch.testing.assert_close(lse, ref.masked_attention_reference(q, k, v, mask, 0.2)[1])
    assert torch.all(lse[0] == float("-inf"))


@on_devices
@pytest.mark.parametrize("tokens", [1, 5, 64, 197])
def test_key_index(device, tokens):
    mask = torch.rand(4, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.3
    mask[0], mask[1] = False, True
    mask = mask.to(device)
    assert all(map(torch.equal, OPS.key_index(mask, "triton"), ref.key_index_reference(mask)))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_rows(device, dtype):
    source = torch.randn(9, 300).to(device, dtype)
    index = torch.tensor([8, -1, 0, -2, 3, *[-1] * 20], dtype=torch.int32, device=device)
    inverse = torch.full((9,), -1, dtype=torch.int32, device=device)
    rows = OPS.take_rows(source, index, inverse, 0.5, "triton")
    torch.testing.assert_close(rows, ref.take_rows_reference(source, index, 0.5), atol=0, rtol=0, equal_nan=True)


def _calls(device):
    q, k, v = qkv(1, 1, 12, 16, torch.float32, device)
    packed = tuple(torch.randn(11, 1, 16, device=device, requires_grad=True) for _ in range(3))
    rows, inverse = (torch.tensor(i, dtype=torch.int32, device=device) for i in ([2, -1, 0], [2, -1, 0, -1]))
    return {
        "masked_attention": (q, k, v, *key_index(masks(1, 12)["some"].to(device)), 0.25, "triton"),
        "varlen_attention": (*packed, torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device), 5, 0.25, "triton"),
        "take_rows": (torch.randn(4, 6, device=device, requires_grad=True), rows, inverse, 0.0, "triton"),
    }


@on_devices
@pytest.mark.parametrize("name", ["masked_attention", "varlen_attention", "take_rows"])
def test_opcheck(device, name):
    torch.library.opcheck(getattr(OPS, name).default, _calls(device)[name])


@on_devices
def test_compiles_as_one_graph_and_exports(device):
    q, k, v, index, count, *_ = _calls(device)["masked_attention"]

    class Model(torch.nn.Module):
        def forward(self, q, k, v, index, count):
            return OPS.masked_attention(q, k, v, index, count, 0.25, "triton")[0] * 2

    model, args = Model(), (q.detach(), k.detach(), v.detach(), index, count)
    plain = model(*args)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*args), plain)
    torch.testing.assert_close(torch.export.export(model, args).module()(*args), plain)

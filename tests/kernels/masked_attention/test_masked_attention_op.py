"""The public attention functions and their operators: results, edge cases, errors, compile and export."""

import pytest
import torch
import torch.nn.functional as F
from l2r2_kernels.masked_attention import key_index, masked_attention, varlen_attention
from l2r2_kernels.masked_attention import reference as ref
from masked_attention_helpers import (
    DEVICES,
    SHAPES,
    check_masked,
    check_masked_poison,
    check_varlen,
    masks,
    qkv,
    run,
)

HALVES = [torch.float16, torch.bfloat16]
OPS = torch.ops.l2r2_kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["some", "one", "none", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_float32(shape, name, device):
    check_masked(shape, torch.float32, masks(shape[0], shape[2])[name], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_masked_half_precision_is_as_good_as_sdpa(shape, dtype, device):
    check_masked(shape, dtype, masks(shape[0], shape[2])["some"], device)


@pytest.mark.gpu
def test_tf32_when_matrix_products_use_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    q, k, v = qkv(2, 3, 150, 64, torch.float32, "cuda")
    mask = masks(2, 150)["some"].cuda()
    truth = ref.masked_attention_reference(q.double(), k.double(), v.double(), mask, 64**-0.5)[0]
    # tf32 rounds each factor to 11 bits: a product is off by 2 * 2**-11 of itself, a score by that part of the sum of |q k|, a
    # weight of the softmax by twice the largest error of its row's scores, and the sum over v by 2 * 2**-11 again.
    rounding = 2 * 2**-11
    scores = q.double().abs() @ k.double().abs().mT * 64**-0.5
    off = 2 * rounding * scores.masked_fill(~mask[:, None, None], 0).amax(-1, keepdim=True) + rounding
    bound = off * ref.masked_attention_reference(q.double(), k.double(), v.double().abs(), mask, 64**-0.5)[0]
    assert bool(((masked_attention(q, k, v, mask).double() - truth).abs() <= bound).all()) and bound.max() < 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_inf_in_masked_keys_go_nowhere(device):
    check_masked_poison(device)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_mask_all_keys_are_kept(device):
    q, k, v = qkv(2, 2, 20, 32, torch.float32, device)
    everything = torch.ones(2, 20, dtype=torch.bool, device=device)
    torch.testing.assert_close(masked_attention(q, k, v, None), masked_attention(q, k, v, everything), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_varlen(dim, dtype, device):
    check_varlen([13, 1, 0, 70], 2, dim, dtype, device, padding=9)


@pytest.mark.parametrize("device", DEVICES)
def test_uninitialised_memory_is_never_shown(device):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    try:
        check_varlen([13, 0, 70], 2, 32, torch.float32, device, padding=30)
        check_masked((2, 2, 61, 32), torch.float32, masks(2, 61)["none"], device)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
def test_backward_is_bitwise_repeatable(device):
    q, k, v = qkv(2, 4, 150, 64, torch.float32, device)
    mask, grad = masks(2, 150)["some"].to(device), torch.randn_like(q)
    first = run(lambda q, k, v: masked_attention(q, k, v, mask), (q, k, v), grad)
    for _ in range(3):
        assert all(map(torch.equal, first, run(lambda q, k, v: masked_attention(q, k, v, mask), (q, k, v), grad)))
    assert all(map(torch.equal, *(check_varlen([90, 61], 4, 64, torch.float32, device) for _ in range(2))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_follows_the_reference_and_gives_lse(dtype, device):
    q, k, v = qkv(2, 2, 20, 32, dtype, device)
    mask = masks(2, 20)["none"].to(device)
    out, lse = OPS.masked_attention(q, k, v, *key_index(mask), 0.2)
    truth, truth_lse = ref.masked_attention_reference(q.double(), k.double(), v.double(), mask, 0.2)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), truth, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), truth_lse, atol=tolerance, rtol=tolerance)
    assert lse.dtype == torch.float32 and torch.all(lse[0] == float("-inf"))


def _op_calls(device):
    q, k, v = qkv(2, 2, 12, 16, torch.float32, device)
    index, count = key_index(masks(2, 12)["none"].to(device))
    packed = tuple(torch.randn(11, 2, 16, device=device, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    rows, inverse = (torch.tensor(i, dtype=torch.int32, device=device) for i in ([2, -1, 0], [2, -1, 0, -1]))
    return {
        "key_index": (torch.ones(2, 5, dtype=torch.bool, device=device),),
        "masked_attention": (q, k, v, index, count, 0.25),
        "varlen_attention": (*packed, cu, 5, 0.25),
        "take_rows": (torch.randn(4, 6, device=device, requires_grad=True), rows, inverse, 0.0),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["key_index", "masked_attention", "varlen_attention", "take_rows"])
def test_opcheck(name, device):
    torch.library.opcheck(getattr(OPS, name).default, _op_calls(device)[name])


def _through_every_op(q, k, v, index, count, cu):
    out = OPS.masked_attention(q, k, v, index, count, 0.25)[0]
    flat = out.transpose(1, 2).flatten(0, 1)
    return OPS.varlen_attention(flat, flat, flat, cu, 8, 0.25)[0] * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_as_one_graph(compiler, device):
    q, k, v, index, count, _ = _op_calls(device)["masked_attention"]
    cu = torch.tensor([0, 8, 16, 24], dtype=torch.int32, device=device)
    compiled = torch.compile(_through_every_op, fullgraph=True, backend=compiler)
    grad = torch.randn(24, 2, 16, device=device)
    plain = run(lambda *t: _through_every_op(*t, index, count, cu), (q, k, v), grad)
    traced = run(lambda *t: compiled(*t, index, count, cu), (q, k, v), grad)
    torch.testing.assert_close(traced, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_exports(device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v, mask, cu):
            out = masked_attention(q, k, v, mask).transpose(1, 2).flatten(0, 1)
            return varlen_attention(out, out, out, cu, 19)

    q, k, v = (x.detach() for x in qkv(2, 2, 12, 16, torch.float32, device))
    mask, cu = masks(2, 12)["some"].to(device), torch.tensor([0, 5, 24], dtype=torch.int32, device=device)
    exported = torch.export.export(Model(), (q, k, v, mask, cu)).module()
    torch.testing.assert_close(exported(q, k, v, ~mask, cu), Model()(q, k, v, ~mask, cu))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_takes_mixed_dtypes_as_sdpa_does(device):
    q, k, v = (x.detach() for x in qkv(2, 2, 12, 16, torch.float32, device))
    mask = masks(2, 12)["some"].to(device)
    with torch.autocast(device, torch.bfloat16):
        out = masked_attention(q, k, v.bfloat16(), mask)
        flat = varlen_attention(q[0], k[0], v[0].bfloat16(), torch.tensor([0, 2], dtype=torch.int32, device=device), 2)
    assert out.dtype == flat.dtype == torch.bfloat16
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out.float(), truth, atol=2e-2, rtol=2e-2)


def test_the_operators_compute_in_their_own_dtype_under_autocast():
    q, k, v, *rest = _op_calls("cpu")["masked_attention"]

    def results():
        return run(lambda q, k, v: OPS.masked_attention(q, k, v, *rest)[0], (q, k, v), torch.ones_like(q))

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, results()))


def test_a_second_derivative_is_refused():
    flat = torch.randn(7, 2, 16, requires_grad=True)
    out = varlen_attention(flat, flat, flat, torch.tensor([0, 7], dtype=torch.int32), 7)
    (grad,) = torch.autograd.grad(out.square().sum(), flat, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_no_images_and_no_tokens():
    for shape in ((0, 2, 5, 8), (2, 2, 0, 8)):
        q = torch.zeros(shape)
        assert masked_attention(q, q, q, torch.ones(shape[0], shape[2], dtype=torch.bool)).shape == shape
    flat = torch.zeros(3, 2, 8)
    assert torch.all(varlen_attention(flat, flat, flat, torch.zeros(1, dtype=torch.int32), 1) == 0)  # padding alone


def test_errors_name_the_argument():
    q = torch.zeros(2, 2, 12, 16)
    mask, cu = torch.ones(2, 12, dtype=torch.bool), torch.tensor([0, 12], dtype=torch.int32)
    flat = torch.zeros(12, 2, 16)
    cases = {
        "q must be": lambda: masked_attention(q[0], q[0], q[0], mask),
        "q must have at least one head and one channel": lambda: varlen_attention(flat[:, :0], flat[:, :0], flat[:, :0], cu, 12),
        "keys must be the output of": lambda: masked_attention(q, q, q, mask, keys=(torch.zeros(2, 11), torch.zeros(2))),
        "k must have q's shape": lambda: masked_attention(q, q[:, :1], q, mask),
        "v must have q's dtype": lambda: masked_attention(q, q, q.double(), mask),
        "key_mask must be a bool": lambda: masked_attention(q, q, q, mask.int()),
        "Unknown backend": lambda: masked_attention(q, q, q, mask, backend="cuda"),
        "backend 'triton' takes": lambda: masked_attention(q.double(), q.double(), q.double(), mask, backend="triton"),
        "cu_seqlens must be an int32": lambda: varlen_attention(flat, flat, flat, cu.long(), 12),
        "cu_seqlens must rise": lambda: varlen_attention(flat, flat, flat, cu + 1, 12),
        "max_len is 11": lambda: varlen_attention(flat, flat, flat, cu, 11),
    }
    for text, call in cases.items():
        with pytest.raises(ValueError, match=text):
            call()

"""The Triton kernels on CPU tensors. Run by ``test_masked_attention_interpreter.py``, which sets TRITON_INTERPRET=1."""

import pytest
import torch
from l2r2_kernels.masked_attention import key_index, masked_attention
from l2r2_kernels.masked_attention import reference as ref
from masked_attention_helpers import check_masked, check_masked_poison, check_varlen, masks, qkv, run

OPS = torch.ops.l2r2_kernels
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["some", "one", "none", "all"])
def test_masked(name):
    check_masked((2, 2, 64, 32), torch.float32, masks(2, 64)[name], backend="triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_masked_half_precision(dtype):
    check_masked((2, 2, 64, 32), dtype, masks(2, 64)["some"], backend="triton")


@pytest.mark.parametrize("shape", [(2, 1, 61, 64), (1, 1, 1, 32), (1, 2, 37, 80), (1, 1, 130, 128)], ids=str)
def test_masked_odd_shapes(shape):
    check_masked(shape, torch.float32, masks(shape[0], shape[2])["some"], backend="triton")


@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.float32), (32, torch.float16), (32, torch.bfloat16), (80, torch.float32)])
def test_varlen(dim, dtype):
    check_varlen([13, 1, 0, 70], 1, dim, dtype, backend="triton", padding=9)


@pytest.mark.parametrize(("max_len", "padding"), [(1, 0), (33, 300)])
def test_varlen_is_right_whatever_max_len_and_padding_are(max_len, padding):
    check_varlen([100, 3], 1, 32, torch.float32, backend="triton", padding=padding, max_len=max_len)


def test_varlen_with_few_programs_a_segment(monkeypatch):
    """A full GPU gets as many programs as an ordinary segment has blocks; longer segments take several turns."""
    from l2r2_kernels.masked_attention import triton

    monkeypatch.setattr(triton, "_FULL_GRID", 0)
    check_varlen([150, 3, 20, 1], 1, 32, torch.float32, backend="triton", padding=40)


def test_nan_and_inf_in_masked_keys_go_nowhere():
    check_masked_poison(backend="triton")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinite_gradients_leave_masked_keys_at_zero():
    q, k, v = qkv(1, 1, 20, 32, torch.float32)
    mask = masks(1, 20)["some"]
    grad = torch.full_like(q, float("inf"))
    _, _, dk, dv = run(lambda q, k, v: masked_attention(q, k, v, mask, backend="triton"), (q, k, v), grad)
    assert torch.all(dk[0, 0][~mask[0]] == 0) and torch.all(dv[0, 0][~mask[0]] == 0)


def test_backward_is_bitwise_repeatable():
    q, k, v = qkv(1, 2, 70, 32, torch.float32)
    mask, grad = masks(1, 70)["some"], torch.randn_like(q)
    first, second = (run(lambda q, k, v: masked_attention(q, k, v, mask, backend="triton"), (q, k, v), grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_contiguous_and_transposed_inputs_and_gradients_agree():
    q, k, v = (x.detach().contiguous().requires_grad_() for x in qkv(2, 2, 30, 32, torch.float32))
    odd = tuple(x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (q, k, v))
    mask = masks(2, 30)["some"]
    grad = torch.randn(2, 2, 1, 1).expand(2, 2, 30, 32)
    results = [run(lambda q, k, v: masked_attention(q, k, v, mask, backend="triton"), t, grad) for t in ((q, k, v), odd)]
    assert all(map(torch.equal, *results))


def test_lse_of_an_image_without_keys():
    q, k, v = qkv(2, 2, 20, 32, torch.float32)
    mask = masks(2, 20)["none"]
    _, lse = OPS.masked_attention(q, k, v, *key_index(mask, "triton"), 0.2, "triton")
    torch.testing.assert_close(lse, ref.masked_attention_reference(q, k, v, mask, 0.2)[1])
    assert torch.all(lse[0] == float("-inf"))


@pytest.mark.parametrize("tokens", [1, 5, 64, 197])
def test_key_index(tokens):
    mask = torch.rand(4, tokens, generator=torch.Generator().manual_seed(tokens)) < 0.3
    mask[0], mask[1] = False, True
    assert all(map(torch.equal, OPS.key_index(mask, "triton"), ref.key_index_reference(mask)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_take_rows(dtype):
    source = torch.randn(9, 300).to(dtype)
    index = torch.tensor([8, -1, 0, -2, 3, *[-1] * 20], dtype=torch.int32)
    inverse = torch.full((9,), -1, dtype=torch.int32)
    rows = OPS.take_rows(source, index, inverse, 0.5, "triton")
    torch.testing.assert_close(rows, ref.take_rows_reference(source, index, 0.5), atol=0, rtol=0, equal_nan=True)


def _calls():
    q, k, v = qkv(1, 1, 12, 16, torch.float32)
    packed = tuple(torch.randn(11, 1, 16, requires_grad=True) for _ in range(3))
    rows, inverse = (torch.tensor(i, dtype=torch.int32) for i in ([2, -1, 0], [2, -1, 0, -1]))
    return {
        "masked_attention": (q, k, v, *key_index(masks(1, 12)["some"]), 0.25, "triton"),
        "varlen_attention": (*packed, torch.tensor([0, 4, 4, 9], dtype=torch.int32), 5, 0.25, "triton"),
        "take_rows": (torch.randn(4, 6, requires_grad=True), rows, inverse, 0.0, "triton"),
    }


@pytest.mark.parametrize("name", ["masked_attention", "varlen_attention", "take_rows"])
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, _calls()[name])


def test_compiles_as_one_graph_and_exports():
    q, k, v, index, count, *_ = _calls()["masked_attention"]

    class Model(torch.nn.Module):
        def forward(self, q, k, v, index, count):
            return OPS.masked_attention(q, k, v, index, count, 0.25, "triton")[0] * 2

    model, args = Model(), (q.detach(), k.detach(), v.detach(), index, count)
    plain = model(*args)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*args), plain)
    torch.testing.assert_close(torch.export.export(model, args).module()(*args), plain)

"""The reference implementations compared with SDPA and finite differences, and their edge cases."""

import pytest
import torch
import torch.nn.functional as F
from l2r2_kernels.masked_attention import reference as ref
from masked_attention_helpers import masks, qkv


@pytest.mark.parametrize("name", ["some", "one", "all"])
def test_equals_sdpa_in_float64(name):
    q, k, v = qkv(3, 2, 21, 16, torch.float64)
    mask = masks(3, 21)[name]
    out, lse = ref.masked_attention_reference(q, k, v, mask, 16**-0.5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(~mask[:, None, None], float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_image_without_keys_is_zero_with_lse_minus_infinity():
    q, k, v = qkv(2, 2, 9, 8, torch.float64)
    mask = masks(2, 9)["none"]
    out, lse = ref.masked_attention_reference(q, k, v, mask, 1.0)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.all(out[0] == 0) and torch.all(lse[0] == float("-inf")) and torch.isfinite(lse[1]).all()
    assert all(torch.all(g[0] == 0) and torch.any(g[1] != 0) for g in grads)


def test_gradcheck_masked():
    q, k, v = qkv(2, 1, 5, 3, torch.float64)
    mask = masks(2, 5)["none"]
    assert torch.autograd.gradcheck(lambda q, k, v: ref.masked_attention_reference(q, k, v, mask, 0.7)[0], (q, k, v))


def test_gradcheck_varlen():
    q, k, v = (torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 3, 3, 7])
    assert torch.autograd.gradcheck(lambda q, k, v: ref.varlen_attention_reference(q, k, v, cu, 0.7)[0], (q, k, v))


def test_varlen_is_each_segment_alone_and_padding_is_zero():
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64) for _ in range(3))
    out, lse = ref.varlen_attention_reference(q, k, v, torch.tensor([0, 3, 3, 7]), 0.5)
    for part in (slice(0, 3), slice(3, 7)):
        alone = F.scaled_dot_product_attention(*(x[part].transpose(0, 1) for x in (q, k, v)), scale=0.5)
        torch.testing.assert_close(out[part], alone.transpose(0, 1))
    assert torch.all(out[7:] == 0) and torch.all(lse[:, 7:] == float("-inf"))


def test_backward_formulas_equal_autograd():
    q, k, v = qkv(3, 2, 13, 8, torch.float64)
    mask = masks(3, 13)["none"]
    out, lse = ref.masked_attention_reference(q, k, v, mask, 0.3)
    grad = torch.randn_like(out)
    truth = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        torch.testing.assert_close(ref.attention_backward(grad, q, k, v, out, lse, mask, 0.3), truth)


def test_varlen_backward_formulas_equal_autograd():
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 3, 3, 7])
    out, lse = ref.varlen_attention_reference(q, k, v, cu, 0.3)
    grad = torch.randn_like(out)
    truth = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        torch.testing.assert_close(ref.varlen_attention_backward(grad, q, k, v, out, lse, cu, 0.3), truth)


def test_key_index_lists_kept_then_dropped_and_gives_the_mask_back():
    mask = torch.tensor([[False, True, False, True], [False, False, False, False], [True, True, True, True]])
    index, count = ref.key_index_reference(mask)
    assert index.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]] and count.tolist() == [2, 0, 4]
    assert torch.equal(ref.key_mask_of(index, count), mask)


def test_take_rows_codes():
    source = torch.arange(6.0).reshape(3, 2)
    rows = ref.take_rows_reference(source, torch.tensor([2, -1, 0, -2], dtype=torch.int32), 7.0)
    assert rows[:3].tolist() == [[4, 5], [7, 7], [0, 1]] and rows[3].isnan().all()

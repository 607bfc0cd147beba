"""Inputs and checks shared by the masked-attention tests and the benchmark's correctness gate."""

import pytest
import torch
import torch.nn.functional as F
from l2r2_kernels.masked_attention import masked_attention, reference, varlen_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# B, H, N, D: lengths that no block divides, a head width that is no power of two, one token, more than one block
SHAPES = [(2, 2, 64, 32), (2, 3, 61, 64), (1, 1, 1, 32), (3, 2, 17, 80), (1, 2, 130, 128)]


def qkv(batch, heads, tokens, dim, dtype, device="cpu", seed=0):
    """q, k, v [B, H, N, D], strided as a ViT's qkv projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float32)
    return tuple(y.transpose(1, 2).requires_grad_() for y in x.to(device, dtype).unbind(2))


def masks(batch, tokens, seed=0):
    """name -> [B, N]: ordinary, one kept, none kept in the first image, all kept."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(batch, tokens, generator=generator) < 0.4
    some[:, 0] = True
    one = torch.zeros(batch, tokens, dtype=torch.bool)
    one[:, tokens // 2] = True
    none_first = some.clone()
    none_first[0] = False
    return {"some": some, "one": one, "none": none_first, "all": torch.ones_like(some)}


def run(function, tensors, grad):
    """Output and gradients."""
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad.to(out))]


def exact(function, tensors, grad):
    """The same in float64."""
    return run(function, tuple(x.detach().double().requires_grad_() for x in tensors), grad)


def errors(results, truth):
    return [(a.double() - b).abs().max().item() for a, b in zip(results, truth)]


def assert_close(results, truth, dtype):
    tolerance = TOLERANCE[dtype]
    for name, a, b in zip(("out", "dq", "dk", "dv"), results, truth):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_no_worse_than_sdpa(results, sdpa_results, truth):
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), errors(results, truth), errors(sdpa_results, truth)):
        # The bound of either is n * eps * sum |products|, far above both. Two orders of summation of the same float32 products
        # differed by a factor of 2 in their largest error (dv on a GPU: 6.9e-6 and 3.4e-6).
        assert ours <= 3 * theirs + 1e-6, f"{name}: {ours:.2e} off, SDPA {theirs:.2e}"


def check_masked(shape, dtype, mask, device="cpu", backend="auto"):
    """Output and gradients against float64 and against SDPA's own error; the rules for masked keys and empty rows."""
    batch, heads, tokens, dim = shape
    tensors, mask = qkv(*shape, dtype, device), mask.to(device)
    grad = torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    results = run(lambda q, k, v: masked_attention(q, k, v, mask, backend=backend), tensors, grad)
    truth = exact(lambda q, k, v: reference.masked_attention_reference(q, k, v, mask, dim**-0.5)[0], tensors, grad)
    assert [x.dtype for x in results] == [dtype] * 4
    assert_close(results, truth, dtype)
    assert torch.all(results[2].transpose(1, 2)[~mask] == 0) and torch.all(results[3].transpose(1, 2)[~mask] == 0)
    empty = ~mask.any(1)
    assert all(torch.all(x[empty] == 0) for x in results)
    # The interpreter cuts float32 to bfloat16 instead of rounding, so there only the tolerance holds.
    cuts = device == "cpu" and backend == "triton" and dtype == torch.bfloat16
    if not empty.any() and not cuts:
        sdpa = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]), tensors, grad)
        assert_no_worse_than_sdpa(results, sdpa, truth)


def check_masked_poison(device="cpu", backend="auto", dtype=torch.float32):
    """NaN and Inf in masked keys and values change nothing, to the bit."""
    q, k, v = qkv(2, 1, 40, 32, dtype, device)
    mask = masks(2, 40)["some"].to(device)
    grad = torch.randn_like(q)
    clean = run(lambda q, k, v: masked_attention(q, k, v, mask, backend=backend), (q, k, v), grad)
    for poison in (float("nan"), float("inf")):
        bad_k, bad_v = (x.detach().masked_fill(~mask[:, None, :, None], poison).requires_grad_() for x in (k, v))
        dirty = run(lambda q, k, v: masked_attention(q, k, v, mask, backend=backend), (q, bad_k, bad_v), grad)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))


def check_varlen(lengths, heads, dim, dtype, device="cpu", backend="auto", padding=0, max_len=None):
    """As ``check_masked``, for segments; tokens after the last are zero everywhere."""
    total = sum(lengths) + padding
    x = torch.randn(total, 3, heads, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tensors = tuple(y.requires_grad_() for y in x.unbind(1))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    grad = torch.randn(total, heads, dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    bound = max(lengths) if max_len is None else max_len
    results = run(lambda q, k, v: varlen_attention(q, k, v, cu, bound, backend=backend), tensors, grad)
    truth = exact(lambda q, k, v: reference.varlen_attention_reference(q, k, v, cu, dim**-0.5)[0], tensors, grad)
    assert [x.dtype for x in results] == [dtype] * 4
    assert_close(results, truth, dtype)
    assert all(torch.all(x[sum(lengths) :] == 0) for x in results)
    return results

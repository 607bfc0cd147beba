"""pack and unpack: kept tokens, gradients, capacities."""

import pytest
import torch
from l2r2_kernels.masked_attention import pack, round_capacity, unpack
from masked_attention_helpers import DEVICES

MASK = torch.tensor([[False, True, False, True, False], [False] * 5, [True] * 5])


def tokens(device="cpu", dtype=torch.float32):
    return torch.arange(1.0, 31.0, device=device, dtype=dtype).reshape(3, 5, 2).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_packs_the_kept_tokens_in_order(num_prefix, device):
    x = tokens(device)
    keep = MASK.clone()
    keep[:, :num_prefix] = True
    packed = pack(x, MASK, num_prefix=num_prefix)
    total = int(keep.sum())
    assert torch.equal(packed.tokens[:total].cpu(), x.detach().cpu()[keep]) and torch.all(packed.tokens[total:] == 0)
    assert packed.cu_seqlens.tolist() == [0, *keep.sum(1).cumsum(0).tolist()] and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_len == 5 and packed.batch == 3 and not packed.overflow
    assert packed.image_of_token()[:total].tolist() == torch.nonzero(keep)[:, 0].tolist()
    assert torch.equal(packed.prefix(), x[:, :num_prefix])
    packed.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fill", [0.0, -3.5])
def test_round_trip_and_gradient(fill, device):
    x = tokens(device)
    keep = MASK.to(device)[..., None]
    back = unpack(pack(x, MASK), fill)
    assert torch.equal(back, torch.where(keep, x, fill))
    grad = torch.randn_like(back)
    assert torch.equal(torch.autograd.grad(back, x, grad)[0], torch.where(keep, grad, 0))


def test_gradcheck():
    x = tokens(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, MASK, num_prefix=1, capacity=12)), (x,))
    assert torch.autograd.gradcheck(lambda x: pack(x, MASK, num_prefix=2).prefix(), (x,))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_dropped_tokens_stays_behind(device):
    x = tokens(device).detach().masked_fill(~MASK.to(device)[..., None], float("nan")).requires_grad_()
    packed = pack(x, MASK)
    assert torch.isfinite(packed.tokens).all() and torch.isfinite(unpack(packed)).all()
    assert torch.isfinite(torch.autograd.grad(packed.tokens.sum(), x)[0]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_capacity_pads_with_zeros_that_carry_no_gradient(device):
    x = tokens(device)
    packed = pack(x, MASK, capacity=11)
    assert packed.tokens.shape == (11, 2) and torch.all(packed.tokens[7:] == 0) and torch.all(packed.source[7:] == -1)
    assert torch.equal(torch.autograd.grad(packed.tokens.sum(), x)[0], MASK.to(device)[..., None].expand(3, 5, 2).float())


def test_capacity_counted_on_the_cpu_is_exact_there():
    assert pack(tokens(), MASK).tokens.shape[0] == 7
    assert pack(tokens(), MASK, num_prefix=1, capacity="sync").tokens.shape[0] == 9


@pytest.mark.gpu
def test_mask_on_the_gpu_needs_a_capacity_and_no_sync():
    x, mask = tokens("cuda"), MASK.cuda()
    with pytest.raises(ValueError, match="capacity is needed"):
        pack(x, mask)
    assert pack(x, mask, capacity="sync").tokens.shape[0] == round_capacity(7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        back = unpack(pack(x, mask, capacity=9))
        back.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(back, torch.where(mask[..., None], x, 0))


def test_overflow_is_refused_where_the_mask_can_be_read():
    with pytest.raises(ValueError, match="capacity is 6, but the mask keeps 7"):
        pack(tokens(), MASK, capacity=6)


def test_overflow_that_cannot_be_read_makes_everything_nan():
    compiled = torch.compile(lambda x, mask: pack(x, mask, capacity=6), fullgraph=True, backend="eager")
    packed = compiled(tokens(), MASK)
    assert bool(packed.overflow) and packed.tokens.isnan().all() and unpack(packed).isnan().all()
    assert int(packed.cu_seqlens[-1]) == 6  # nothing reads past the tokens
    with pytest.raises(OverflowError, match="did not fit into 6 rows"):
        packed.check()


def test_other_masks_do_not_recompile():
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, mask: unpack(pack(x, mask, capacity=12)), fullgraph=True, backend=count)
    for seed in range(4):
        mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
        assert torch.equal(compiled(tokens(), mask), torch.where(mask[..., None], tokens(), 0))
    assert count.frame_count == 1


def test_round_capacity_is_close_and_coarse():
    sizes = {round_capacity(total) for total in range(1, 65537)}
    assert all(total <= round_capacity(total) <= max(1.04 * total, total + 63) for total in range(1, 65537, 7))
    assert len(sizes) < 320 and all(size % 64 == 0 for size in sizes) and round_capacity(0) == 0


def test_an_empty_mask_gives_no_tokens():
    packed = pack(tokens(), torch.zeros_like(MASK))
    assert packed.tokens.shape == (0, 2) and torch.all(unpack(packed) == 0)


def test_images_without_tokens():
    packed = pack(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool), capacity=4)
    assert unpack(packed).shape == (2, 0, 3) and packed.image_of_token().tolist() == [0] * 4
    assert unpack(pack(torch.zeros(0, 5, 3), torch.zeros(0, 5, dtype=torch.bool), num_prefix=1)).shape == (0, 5, 3)


def test_errors_name_the_argument():
    x = tokens()
    cases = {
        "x must be a floating": lambda: pack(x.int(), MASK),
        "mask must be a bool": lambda: pack(x, MASK[:, :4]),
        "num_prefix must be": lambda: pack(x, MASK, num_prefix=6),
        'capacity must be a number of tokens, None or "sync"': lambda: pack(x, MASK, capacity="auto"),
        "capacity must be a number of tokens": lambda: pack(x, MASK, capacity=7.5),
        "capacity must not be negative": lambda: pack(x, MASK, capacity=-1),
    }
    for text, call in cases.items():
        with pytest.raises(ValueError, match=text):
            call()

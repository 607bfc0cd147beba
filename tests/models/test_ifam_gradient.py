"""The gradient of iFAM's stage 2 loss through the hard mask, compared with finite differences of attention written out."""

import copy

import pytest
import torch
from test_ifam import ifam, images
from torch.nn.functional import cross_entropy

POOLS = {
    "class token": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "mean": {"global_pool": "avg", "class_token": False},
    "mean beside a class token": {"global_pool": "avg"},
    "mean with the class token": {"global_pool": "avg", "pool_include_prefix": True},
}


def weighted_answer(net, x, weights):
    """Stage 2 on all tokens of one image: attention weights times those of the keys `[N]`, normalized after it; so the mean."""
    vit, head = net.backbone_of("fg"), net.heads["fg"]
    y, prefixes = vit._pos_embed(vit.patch_embed(x)), vit.num_prefix_tokens
    keys = torch.cat([weights.new_ones(prefixes), weights])
    for block in vit.blocks:
        q, k, v = block.attn.qkv(block.norm1(y)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        seen = (q @ k.mT * block.attn.scale).exp() * keys
        y = y + block.attn.proj((seen / seen.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    y = vit.norm(y)
    pooled = keys if vit.pool_include_prefix else torch.cat([keys.new_zeros(prefixes), weights])
    mean = (y * pooled[:, None]).sum(1) / pooled.sum()
    return head(vit.fc_norm(y[:, 0] if vit.global_pool == "token" else mean))


def gradient_and_differences(pool, seed=3):
    """The gradient of stage 2's loss by the foreground map, and in float64 by how much the loss changes per weight `[N]` of a
    patch, and between keeping it and dropping it."""
    net, x, label = ifam(shared=False, depth=2, **POOLS[pool]).train(), images(1), torch.tensor([2])
    torch.manual_seed(seed)
    out = net.forward_views(x)
    loss = cross_entropy(out.fg, label)
    grads = torch.autograd.grad(loss, [out.parts.maps, net.parts.prototypes], retain_graph=True)
    exact, keep = copy.deepcopy(net).double(), out.parts.keep.flatten()
    weights = keep.double()

    @torch.no_grad()
    def loss_with(patch, value):
        changed = weights.clone()
        changed[patch] = value
        return cross_entropy(weighted_answer(exact, x.double(), changed), label).item()

    assert loss.item() == pytest.approx(loss_with(0, weights[0]), abs=1e-5)  # the weights are 1 and 0
    step = 1e-4
    around = [(loss_with(n, w + step) - loss_with(n, w - step)) / (2 * step) for n, w in enumerate(weights)]
    toggled = [loss_with(n, 1.0) - loss_with(n, 0.0) for n in range(len(weights))]
    return net, out, *grads, torch.tensor(around), torch.tensor(toggled)


@pytest.mark.parametrize("pool", POOLS)
def test_the_gradient_is_that_of_how_much_a_patch_counts(pool):
    """At every patch, dropped ones too: stage 2 can ask for a patch to be left out, and for one to be brought back."""
    net, out, grad, to_prototypes, around, toggled = gradient_and_differences(pool)
    keep, gradient = out.parts.keep.flatten(), grad[0, 0].flatten()
    assert 5 < keep.sum() < len(keep) - 5
    size = around.abs().max()
    assert torch.allclose(gradient / size, around / size, atol=1e-3)
    for patches in (keep, ~keep):
        assert torch.corrcoef(torch.stack([gradient[patches], toggled[patches]]))[0, 1] > 0.9
    surrogate = (out.parts.foreground().flatten() * around).sum()  # the whole way: nothing else reaches the prototypes
    expected = torch.autograd.grad(surrogate, net.parts.prototypes)[0]
    assert torch.allclose(to_prototypes / expected.abs().max(), expected / expected.abs().max(), atol=1e-3)


@pytest.mark.parametrize("pool", POOLS)
def test_the_weights_of_training_change_no_prediction(pool):
    """Stage 2 sees the hard mask: in training to rounding, in evaluation to the bit, as if the mask came by hand."""
    net, x = ifam(part_dropout=0.0, **POOLS[pool]), images()
    net.parts.eval()  # no noise
    with torch.no_grad():
        out = net.forward_views(x)
        assert torch.equal(net.forward_views(x, mask=out.parts.keep).fg, out.fg)
        net.training = True
        assert torch.allclose(net.forward_views(x).fg, out.fg, atol=1e-6)


def test_the_gradient_through_the_mask_under_autocast_and_where_nothing_is_kept():
    net, x = ifam(shared=False).train(), images(2)
    mask_gradients = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = net.forward_views(x)
        mask_gradients.append(torch.autograd.grad(out.fg.float().square().sum(), out.parts.maps)[0])
    assert torch.corrcoef(torch.stack(mask_gradients).flatten(1))[0, 1] > 0.9
    with torch.no_grad():
        net.parts.prototypes[:3] = 200  # every patch is background
    for options in POOLS.values():
        bare = ifam(shared=False, **options).train()
        bare.parts.load_state_dict(net.parts.state_dict())
        out = bare.forward_views(x)
        (grad,) = torch.autograd.grad(out.fg.square().sum(), out.parts.maps)
        assert not out.has_fg.any() and out.fg.isfinite().all() and grad.isfinite().all()


def test_a_mask_by_hand_tells_stage_1_nothing():
    net, x = ifam(shared=False).train(), images()
    out = net.forward_views(x, mask=torch.ones(3, 8, 8))
    assert torch.autograd.grad(out.fg.sum(), net.parts.prototypes, allow_unused=True) == (None,)

"""timm blocks on kept tokens: exactness, training, refusals."""

import copy
from functools import partial

import pytest
import timm
import torch
from l2r2_kernels.masked_attention import pack, run_masked, run_packed, varlen_attention
from masked_attention_helpers import DEVICES
from timm.layers import DropPath, GlobalResponseNormMlp, RmsNorm
from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer

VARIANTS = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "layer_scale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "rms_norm": {"norm_layer": RmsNorm, "qk_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "swiglu": {"mlp_layer": timm.layers.SwiGLUPacked},
    "avg_pool": {"global_pool": "avg", "class_token": False},
    "gated": {"attn_layer": lambda *args, **kwargs: timm.layers.Attention(*args, gated=True, **kwargs)},
}


def vit(**kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": 56, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    attn_layer = kwargs.pop("attn_layer", None)
    model = VisionTransformer(**sizes, **kwargs)
    if attn_layer is not None:
        for block in model.blocks:
            block.attn = attn_layer(48, num_heads=3, qkv_bias=True)
    for p in model.parameters():  # away from the zeros and ones that hide a forgotten layer
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def entered(model, images):
    """Tokens as they enter the first block."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def kept_mask(model, batch=3, share=0.3):
    return torch.rand(batch, model.num_prefix_tokens + 49, generator=torch.Generator().manual_seed(3)) < share


def logits(model, tokens, mask):
    """The head on class token or on the mean of the kept tokens."""
    tokens = model.norm(tokens)
    if model.global_pool == "token":
        return model.head(model.fc_norm(tokens[:, 0]))
    kept = mask[..., None].float()
    return model.head(model.fc_norm((tokens * kept).sum(1) / kept.sum(1)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_masked_equals_timm(variant, device):
    try:
        model = vit(**VARIANTS[variant]).to(device)
    except TypeError as error:
        pytest.skip(f"this timm has no such option: {error}")
    prefix, mask = model.num_prefix_tokens, kept_mask(model).to(device)
    x = entered(model, torch.randn(3, 3, 56, 56).to(device))
    packed, unpacked = run_packed(model.blocks, x, mask.cpu(), num_prefix=prefix, unpacked=True)
    masked = run_masked(model.blocks, x, mask, num_prefix=prefix)
    mask[:, :prefix] = True
    timm_own = x
    for block in model.blocks:
        timm_own = block(timm_own, attn_mask=mask[:, None, None, :])
    scale = timm_own.abs().max()
    torch.testing.assert_close(masked / scale, timm_own / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(unpacked[mask] / scale, masked[mask] / scale, atol=1e-5, rtol=0)
    assert torch.all(unpacked[~mask] == 0)
    assert torch.equal(packed.prefix(), unpacked[:, :prefix])
    torch.testing.assert_close(logits(model, unpacked, mask), logits(model, masked, mask), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_training_with_drop_path_equals_masked_and_drops_whole_images(device):
    model = vit(drop_path_rate=0.5, init_values=0.3).to(device).train()
    mask = kept_mask(model)
    x = entered(model, torch.randn(3, 3, 56, 56, device=device)).detach()
    weights = [p for p in model.blocks.parameters() if p.requires_grad]

    def step(runner, **kwargs):
        torch.manual_seed(5)
        out = runner(model.blocks, x, mask, num_prefix=1, **kwargs)
        out = out[1] if isinstance(out, tuple) else out
        return out[:, 0], torch.autograd.grad(out[:, 0].square().mean(), weights, allow_unused=True)

    (packed, packed_grads), (masked, masked_grads) = step(run_packed, unpacked=True), step(run_masked)
    torch.testing.assert_close(packed, masked, atol=1e-5, rtol=1e-5)
    for a, b in zip(packed_grads, masked_grads):
        if a is None or b is None:
            assert a is None and b is None
        else:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runner", [partial(run_packed, unpacked=True), run_masked])
def test_checkpointing_keeps_less_and_changes_no_gradient(runner):
    model, stored = vit(drop_path_rate=0.5).train(), []
    mask, x = kept_mask(model), entered(model, torch.randn(3, 3, 56, 56)).detach()
    mask[:, 0] = True
    key_weight = mask.float().requires_grad_()
    options = {"key_weight": key_weight} if runner is run_masked else {}
    weights = [*options.values(), *model.blocks.parameters()]

    def step(checkpoint):
        torch.manual_seed(5)
        stored.append(0)

        def keep(tensor):
            stored[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = runner(model.blocks, x, mask, num_prefix=1, checkpoint=checkpoint, **options)
        out = out[1] if isinstance(out, tuple) else out
        return torch.autograd.grad(out[:, 0].square().mean(), weights)

    for a, b in zip(step(True), step(False)):
        assert torch.equal(a, b)
    assert stored[0] < stored[1] / 4


def test_drop_path_is_drawn_once_an_image():
    block = vit().blocks[0].train()
    block.drop_path1 = block.drop_path2 = DropPath(0.5)
    x = torch.randn(64, 6, 48)
    _, out = run_packed([block], x, torch.ones(64, 6, dtype=torch.bool), unpacked=True)
    untouched = (out == x).all(-1)  # both branches dropped
    assert torch.equal(untouched.any(1), untouched.all(1)) and 4 <= int(untouched.all(1).sum()) <= 28


def test_padding_and_other_images_change_nothing():
    model = vit()
    x, mask = torch.randn(3, 50, 48), kept_mask(model)
    weights = list(model.blocks.parameters())

    def step(x, mask, **kwargs):
        out = run_packed(model.blocks, x, mask, num_prefix=1, unpacked=True, **kwargs)[1]
        return out.detach(), torch.autograd.grad(out.square().mean(), weights)

    exact, exact_grads = step(x, mask)
    roomy, roomy_grads = step(x, mask, capacity=150)
    alone, _ = step(x[1:2], mask[1:2])
    torch.testing.assert_close(roomy, exact, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(alone[0], exact[1], atol=1e-4, rtol=1e-5)
    for a, b in zip(roomy_grads, exact_grads):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


def test_packed_compiles_as_one_graph_and_gives_weight_gradients():
    model = vit(drop_path_rate=0.2, reg_tokens=2)
    x, mask = torch.randn(3, 52, 48), kept_mask(model)[:, :52]

    def forward(x, mask):
        return run_packed(model.blocks, x, mask, num_prefix=3, capacity=96, unpacked=True)[1]

    out = torch.compile(forward, fullgraph=True, backend="aot_eager")(x, mask)
    torch.testing.assert_close(out, forward(x, mask), atol=1e-4, rtol=1e-5)
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.blocks.parameters())


def test_image_without_a_token_is_harmless():
    model = vit(global_pool="avg", class_token=False)
    x, mask = torch.randn(2, 49, 48), torch.rand(2, 49) < 0.5
    mask[0] = False
    packed, unpacked = run_packed(model.blocks, x, mask, unpacked=True, fill=2.0)
    assert torch.isfinite(packed.tokens).all() and torch.all(unpacked[0] == 2)
    assert torch.isfinite(run_masked(model.blocks, x, mask)).all()


def plain_softmax(blocks, x, weight):
    """The blocks with weighted softmax written out: weight ``[B, N]`` times exp(qk * scale), normalized after it."""
    for block in blocks:
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale).exp() * weight[:, None, None]
        x = x + block.ls1(attn.proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x


def weighted_step(blocks, x, weight, runner):
    """The result, and the gradients of x, the weights of the keys and the parameters."""
    leaves = [y.detach().requires_grad_() for y in (x, weight)]
    out = runner(blocks, *leaves)
    return [out, *torch.autograd.grad(out.square().mean(), [*leaves, *blocks.parameters()])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["plain", "registers", "qk_norm", "avg_pool"])
def test_the_gradient_of_key_weights_reaches_masked_tokens_too(variant, device):
    model = vit(**VARIANTS[variant]).to(device)
    mask = kept_mask(model).to(device)
    mask[:, : max(1, model.num_prefix_tokens)] = True
    x = torch.randn(*mask.shape, 48, generator=torch.Generator().manual_seed(1)).to(device)
    truth = weighted_step(copy.deepcopy(model.blocks).double(), x.double(), mask.double(), plain_softmax)
    got = weighted_step(model.blocks, x, mask.float(), lambda blocks, y, w: run_masked(blocks, y, mask, key_weight=w))
    for value, expected in zip(got, truth):
        size = expected.abs().max().clamp_min(1e-2)  # the bias of k_norm has no effect: its gradient is rounding
        torch.testing.assert_close(value.double() / size, expected / size, atol=2e-5, rtol=0)
    assert torch.all(got[2] != 0)


def test_key_weights_change_nothing_else_and_large_odds_stay_finite():
    model = vit(reg_tokens=2)
    mask = kept_mask(model)
    mask[:, :3] = True
    x = torch.randn(*mask.shape, 48)
    options = {"num_prefix": 3, "checkpoint": True}
    without = run_masked(model.blocks, x, mask, **options)
    weight = mask.float().requires_grad_()
    assert torch.equal(run_masked(model.blocks, x, mask, key_weight=weight, **options), without)
    far = torch.where(mask[..., None], x, 1e4 * x)  # norms keep tokens in bounds; the projections do not
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    run_masked(model.blocks, far, mask, key_weight=weight, **options).square().mean().backward()
    assert weight.grad.isfinite().all()


def test_key_weights_under_autocast_compiled_and_with_an_empty_image():
    model = vit()
    mask = kept_mask(model)
    mask[:, 0], mask[0] = True, False
    x = torch.randn(3, 50, 48)

    def gradient(runner):
        weight = mask.float().requires_grad_()
        out = runner(model.blocks[:1], x, mask, key_weight=weight)
        return torch.autograd.grad(out[:, 0].square().mean(), weight)[0]

    expected = gradient(run_masked)
    assert torch.all(expected[0] == 0) and torch.all(expected[1:] != 0)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradient(run_masked)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.1 * expected.abs().max().item(), rtol=0)
    compiled = torch.compile(run_masked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_key_weights_that_do_not_fit_are_named():
    x, mask = torch.zeros(1, 4, 128), torch.ones(1, 4, dtype=torch.bool)
    for weight in (torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 1, 4)):
        with pytest.raises(ValueError, match=r"key_weight must be a floating tensor \[B, N\] = \[1, 4\]"):
            run_masked([Block(128, 4)], x, mask, key_weight=weight)


def _hooked(block):
    block.attn.register_forward_hook(lambda *args: None)
    return block


def _extra(block):
    block.attn.rel_pos = torch.nn.Parameter(torch.zeros(1))
    return block


def _rope(block):
    block.attn = timm.layers.AttentionRope(48, 3)
    return block


def _grn(block):
    block.mlp = GlobalResponseNormMlp(48, 96)
    return block


def _dropping(block):
    block.attn.attn_drop.p = 0.1
    return block.train()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EvaBlockPostNorm(48, 3), "EvaBlockPostNorm"),
        (lambda: ParallelScalingBlock(48, 3), "ParallelScalingBlock"),
        (lambda: ParallelThingsBlock(48, 3), "ParallelThingsBlock"),
        (lambda: ResPostBlock(48, 3), "ResPostBlock"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1).blocks[0], "Block"),
        (lambda: timm.create_model("samvit_base_patch16_224", depth=1).blocks[0], "Block"),
        (lambda: _rope(Block(48, 3)), "AttentionRope"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (lambda: _extra(vit().blocks[0]), "rel_pos"),
        (lambda: _hooked(vit().blocks[0]), "hooks"),
        (lambda: _grn(vit().blocks[0]), "GlobalResponseNormMlp"),
        (lambda: _dropping(vit().blocks[0]), "attn_drop"),
    ],
)
def test_foreign_blocks_are_refused_by_name(make, text):
    mask = torch.ones(1, 4, dtype=torch.bool)
    for runner in (run_packed, run_masked):
        with pytest.raises(TypeError, match=r"Block 0 is a \w+ that cannot run on masked tokens: ") as error:
            runner([make()], torch.zeros(1, 4, 48), mask)
        assert text in str(error.value)


def test_run_masked_names_a_wrong_argument():
    x, mask = torch.zeros(1, 50, 48), torch.ones(1, 50, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask must be a bool"):
        run_masked(vit().blocks, x, mask[:, :49])
    with pytest.raises(ValueError, match="x must be a floating"):
        run_masked(vit().blocks, x[0], mask)
    for num_prefix in (-1, 51):
        with pytest.raises(ValueError, match="num_prefix must be"):
            run_masked(vit().blocks, x, mask, num_prefix=num_prefix)


def test_parts_compose_by_hand():
    """pack, varlen_attention and unpack do together what masked attention does on the kept tokens."""
    x, mask = torch.randn(2, 7, 8), torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    packed = pack(x, mask)
    heads = packed.tokens.unflatten(-1, (2, 4))
    out = varlen_attention(heads, heads, heads, packed.cu_seqlens, packed.max_len).flatten(1)
    alone = x[0][mask[0]].unflatten(-1, (2, 4)).transpose(0, 1)
    truth = torch.nn.functional.scaled_dot_product_attention(alone, alone, alone).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out[:4], truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[4], x[1, 2])

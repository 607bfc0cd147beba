"""PackedRunner: eager if no graph can be replayed, one graph per shape, the same results either way."""

import copy

import pytest
import timm
import torch
from l2r2_kernels import PackedRunner, run_packed

BATCH, TOKENS, CAPACITY = 3, 50, 96


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=112, depth=2, embed_dim=48, num_heads=3, **options).eval()


def eva():
    torch.manual_seed(0)
    sizes = {"img_size": 112, "patch_size": 16, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("eva02_tiny_patch14_224", **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(seed=0, images=BATCH, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(images, TOKENS, generator=g) < 0.4
    return torch.randn(images, TOKENS, 48, generator=g).to(device), mask.to(device)


def test_on_a_cpu_it_is_run_packed():
    model = vit()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True)
    for seed, images in ((0, BATCH), (1, BATCH), (2, 1), (3, BATCH + 2)):  # a last batch may be smaller, or one larger
        x, mask = batch(seed, images)
        packed, unpacked = run(x, mask)
        expected, expected_unpacked = run_packed(model.blocks, x, mask, num_prefix=1, unpacked=True)
        torch.testing.assert_close(unpacked, expected_unpacked)
        assert torch.equal(packed.cu_seqlens, expected.cu_seqlens)
        assert images > BATCH or packed.tokens.shape[0] == CAPACITY


def test_rotary_embeddings_reach_the_blocks():
    model = eva()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True)
    x, mask = batch()
    for rope in (model.rope.get_embed(), model.rope.get_embed().flip(0)):
        expected = run_packed(model.blocks, x, mask, num_prefix=1, unpacked=True, rope=rope)[1]
        torch.testing.assert_close(run(x, mask, rope)[1], expected)


def test_a_smaller_capacity_than_is_needed_is_named():
    x, mask = batch()
    with pytest.raises(ValueError, match="capacity is 8, but the mask keeps"):
        PackedRunner(vit().blocks, BATCH, TOKENS, 8, num_prefix=1)(x, mask)


def test_a_graph_is_good_for_one_shape_dtype_autocast_mode_and_place_of_the_parameters():
    model = vit()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1)
    x, _ = batch()
    key = run.key(x)
    assert run.key(x.clone()) == key and run.key(x.bfloat16()) != key and run.key(x.requires_grad_()) != key
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert run.key(x) != key
    with torch.inference_mode():
        assert run.key(x) != key
    assert len({key, run.key(x, torch.zeros(49, 32)), run.key(x, torch.zeros(49, 32, dtype=torch.bfloat16))}) == 3
    model.load_state_dict(vit().state_dict())  # in place
    assert run.key(x) == key
    model.train()
    assert run.key(x) != key
    model.eval().blocks[0].attn.proj.weight = torch.nn.Parameter(torch.zeros(48, 48))
    assert run.key(x) != key


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_replays_are_bit_equal_also_with_another_mask(autocast):
    model = vit().cuda()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for seed in range(4):
            x, mask = batch(seed, device="cuda")
            expected = run_packed(model.blocks, x, mask, num_prefix=1, capacity=CAPACITY, unpacked=True)
            packed, unpacked = run(x, mask)
            assert run._graph is not None
            assert torch.equal(unpacked, expected[1]) and torch.equal(packed.tokens, expected[0].tokens)


@pytest.mark.gpu
def test_replays_take_other_rotary_embeddings():
    model = eva().cuda()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True)
    x, mask = batch(device="cuda")
    with torch.inference_mode():
        for rope in (model.rope.get_embed(), model.rope.get_embed().flip(0)):
            expected = run_packed(model.blocks, x, mask, num_prefix=1, capacity=CAPACITY, unpacked=True, rope=rope)[1]
            assert torch.equal(run(x, mask, rope)[1], expected)
    assert run._graph is not None


@pytest.mark.gpu
def test_training_steps_are_those_of_run_packed():
    model = vit().cuda().train()
    twin = copy.deepcopy(model)
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True, training=True)
    for seed in range(3):
        x, mask = batch(seed, device="cuda")
        results = []
        for blocks, runner in ((model.blocks, run), (twin.blocks, None)):
            leaf = x.clone().requires_grad_()
            if runner is None:
                out = run_packed(blocks, leaf, mask, num_prefix=1, capacity=CAPACITY, unpacked=True)[1]
            else:
                out = runner(leaf, mask)[1]
            out.square().mean().backward()
            results.append([leaf.grad, *(p.grad.clone() for p in blocks.parameters())])
            blocks.zero_grad()
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert run._graph is not None

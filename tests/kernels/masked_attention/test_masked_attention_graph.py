"""PackedRunner: eager if no graph can be replayed, one graph per shape, the same results either way."""

import copy

import pytest
import timm
import torch
from l2r2_kernels import MaskedRunner, PackedRunner, run_masked, run_packed
from recorded_on_cpu import RecordedOnCPU

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


# --- recorded on the CPU: the same code, with recordings that compute into the same tensors ---------------------------------


def eagerly(blocks):
    return lambda x, mask, rope=None: run_packed(
        blocks, x, mask, num_prefix=1, capacity=CAPACITY, unpacked=True, rope=rope
    )


def training_pair(model):
    """(a runner that replays, a copy of the model to compare with, the memory)."""
    memory, twin = RecordedOnCPU(), copy.deepcopy(model)
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True, training=True, memory=memory)
    return run, twin, memory


@pytest.mark.parametrize("kind", ["vit", "eva", "bf16", "frozen"])
def test_recorded_training_steps_are_bit_equal_and_accumulate(kind):
    """Three parts of a batch, of which the gradients add up, then a step of the optimizer and two parts more."""
    model = (eva() if kind == "eva" else vit()).train()
    if kind == "frozen":
        model.blocks[0].requires_grad_(False)
    run, twin, memory = training_pair(model)
    rope = model.rope.get_embed() if kind == "eva" else None
    trained = [[p for p in m.blocks.parameters() if p.requires_grad] for m in (model, twin)]
    optimizers = [torch.optim.SGD(parameters, 0.1) for parameters in trained]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        for parts in ((0, 1, 2), (3, 4)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for seed in parts:
                x, mask = batch(seed)
                results = []
                for function in (run, eagerly(twin.blocks)):
                    leaf, angles = x.clone().requires_grad_(), None if rope is None else rope.clone().requires_grad_()
                    out = function(leaf, mask, angles)[1]
                    out.square().mean().backward()
                    results.append([out.detach().clone(), leaf.grad, *([] if angles is None else [angles.grad])])
                results[0] += [p.grad.clone() for p in trained[0]]
                results[1] += [p.grad.clone() for p in trained[1]]
                assert all(map(torch.equal, *results))
            for optimizer in optimizers:
                optimizer.step()
    assert memory.recorded == 2 and memory.replayed == 10, "one graph, forward and backward, used in every part"


def test_drop_path_draws_as_without_a_graph():
    model = vit(drop_path_rate=0.5).train()
    run, twin, memory = training_pair(model)
    outs = []
    for function in (run, eagerly(twin.blocks)):
        torch.manual_seed(3)
        outs.append([function(*batch(seed))[1].detach().clone() for seed in range(3)] + [torch.rand(1)])
    assert all(map(torch.equal, *outs)) and memory.replayed == 3


def test_recording_leaves_gradients_and_hooks_of_parameters_alone():
    """As under DistributedDataParallel, whose hooks fire once per backward pass."""
    model, fired = vit().train(), []
    run, _, _ = training_pair(model)
    weight = model.blocks[0].attn.proj.weight
    weight.grad = torch.full_like(weight, 2.0)
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    out = run(*batch())[1]
    assert not fired and (weight.grad == 2).all()
    out.sum().backward()
    assert len(fired) == 1 and not (weight.grad == 2).all()


def test_a_recording_does_not_meet_the_autograd_nodes_of_the_parameters():
    """Those may be on the stream of another pass, which a capture must not wait for."""
    model, met = vit().train(), []

    def leaves(value):
        todo, seen = [value.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                met.extend([node.variable] if hasattr(node, "variable") else [])
                todo += [following for following, _ in node.next_functions]

    class Watched(RecordedOnCPU):
        def record(self, call):
            def watched():
                values = call()
                for value in values:
                    leaves(value)
                return values

            return super().record(watched)

    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, training=True, memory=Watched())
    run(*batch())
    own = {id(p) for p in model.parameters()}
    assert met and not own & set(map(id, met))


def test_a_second_use_before_the_backward_pass_runs_eagerly():
    """It would overwrite the activations of the first."""
    model = vit().train()
    run, twin, memory = training_pair(model)
    for function in (run, eagerly(twin.blocks)):
        first, second = function(*batch(0))[1], function(*batch(1))[1]
        (first.square().mean() + 2 * second.square().mean()).backward()
    for got, expected in zip(model.blocks.parameters(), twin.blocks.parameters()):
        torch.testing.assert_close(got.grad, expected.grad)
    assert memory.recorded == 2 and memory.replayed == 2 and not memory.busy
    forgotten = run(*batch(2))[1]
    assert memory.busy
    del forgotten  # a step that ends without a backward pass
    assert not memory.busy
    with torch.no_grad():
        run(*batch(3))
    assert memory.replayed == 3, "calls without gradients are not those of this graph"


def test_a_retained_graph_is_refused():
    run, _, _ = training_pair(vit().train())
    loss = run(*batch())[1].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass per forward pass"):
        loss.backward()


def test_runners_of_several_capacities_share_memory():
    model = vit().train()
    memory = RecordedOnCPU()
    runs = [
        PackedRunner(model.blocks, BATCH, TOKENS, c, num_prefix=1, unpacked=True, training=True, memory=memory)
        for c in (CAPACITY, 128)
    ]
    waiting = runs[0](*batch())[1]
    runs[1](*batch(1))
    assert memory.replayed == 1, "the other ran eagerly"
    waiting.sum().backward()
    runs[1](*batch(1))
    assert memory.replayed == 3


def test_weights_that_move_or_freeze_are_recorded_anew():
    model = vit().train()
    run, _, memory = training_pair(model)
    run(*batch())[1].sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # an optimizer or an average, in place
    x, mask = batch(1)
    expected = eagerly(model.blocks)(x, mask)[1]
    assert torch.equal(run(x, mask)[1], expected) and memory.recorded == 2
    model.blocks[1].mlp.fc1.weight = torch.nn.Parameter(model.blocks[1].mlp.fc1.weight * 2)
    expected = eagerly(model.blocks)(x, mask)[1]
    assert torch.equal(run(x, mask)[1], expected) and memory.recorded == 4
    model.blocks[0].requires_grad_(False)
    run(x, mask)[1].sum().backward()
    assert memory.recorded == 6 and model.blocks[0].mlp.fc1.weight.grad is not None
    model.zero_grad()
    run(x, mask)[1].sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad is None


def test_replays_for_inference_on_the_cpu():
    model, memory = vit(), RecordedOnCPU()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True, memory=memory)
    with torch.inference_mode():
        for seed in range(3):
            x, mask = batch(seed)
            packed, out = run(x, mask)
            expected, unpacked = eagerly(model.blocks)(x, mask)
            assert torch.equal(out, unpacked) and torch.equal(packed.tokens, expected.tokens)
    assert memory.recorded == 1 and memory.replayed == 3


@pytest.mark.parametrize("kind", ["vit", "eva"])
def test_masked_blocks_with_key_weights_are_recorded_too(kind):
    model = (eva() if kind == "eva" else vit()).train()
    twin, memory = copy.deepcopy(model), RecordedOnCPU()
    run = MaskedRunner(model.blocks, BATCH, TOKENS, num_prefix=1, training=True, memory=memory)
    rope = model.rope.get_embed() if kind == "eva" else None
    for seed in range(3):
        x, mask = batch(seed)
        results = []
        for blocks, function in ((model.blocks, run), (twin.blocks, None)):
            leaf, weight = x.clone().requires_grad_(), mask.float().requires_grad_()
            if function is None:
                out = run_masked(blocks, leaf, mask, num_prefix=1, key_weight=weight, rope=rope)
            else:
                out = function(leaf, mask, weight, rope)
            out.square().mean().backward()
            results.append([out.detach().clone(), leaf.grad, weight.grad, *(p.grad.clone() for p in blocks.parameters())])
        assert all(map(torch.equal, *results))
    assert memory.recorded == 2 and memory.replayed == 6


# --- on a GPU ---------------------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("autocast", [False, True])
def test_training_steps_are_those_of_run_packed(autocast):
    """Two parts of a batch, in each of which the same weights also see all tokens, before the graph is recorded."""
    model = vit().cuda().train()
    twin = copy.deepcopy(model)
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True, training=True)
    for seed in range(4):
        x, mask = batch(seed, device="cuda")
        results = []
        for net, function in ((model, run), (twin, eagerly(twin.blocks))):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                full, packed = net.blocks(leaf), function(leaf, mask)[1]
                loss = (full.float().square() + packed.float().square()).mean()
            loss.backward()
            results.append([leaf.grad, *(p.grad.clone() for p in net.blocks.parameters())])
            if seed % 2:
                net.zero_grad()
        tolerance = 2e-2 if autocast else 1e-5
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, atol=tolerance * 0.1, rtol=tolerance)
    assert run._graph is not None


@pytest.mark.gpu
def test_drop_path_draws_anew_in_every_replay():
    model = vit(drop_path_rate=0.5).cuda().train()
    run = PackedRunner(model.blocks, BATCH, TOKENS, CAPACITY, num_prefix=1, unpacked=True, training=True)
    x, mask = batch(device="cuda")
    outs = []
    for _ in range(8):
        out = run(x, mask)[1]
        outs.append(out.detach().clone())
        out.sum().backward()
    assert run._graph is not None and len({float(out.sum()) for out in outs}) > 1


@pytest.mark.gpu
def test_masked_training_steps_are_those_of_run_masked():
    model = vit().cuda().train()
    twin = copy.deepcopy(model)
    run = MaskedRunner(model.blocks, BATCH, TOKENS, num_prefix=1, training=True)
    for seed in range(3):
        x, mask = batch(seed, device="cuda")
        results = []
        for blocks, function in ((model.blocks, run), (twin.blocks, None)):
            leaf, weight = x.clone().requires_grad_(), mask.float().requires_grad_()
            if function is None:
                out = run_masked(blocks, leaf, mask, num_prefix=1, key_weight=weight)
            else:
                out = function(leaf, mask, weight)
            out.square().mean().backward()
            results.append([leaf.grad, weight.grad, *(p.grad.clone() for p in blocks.parameters())])
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert run._graph is not None

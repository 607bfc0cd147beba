"""CUDA graphs for prediction and training: the same features with and without, few graphs, and only where they apply."""

import contextlib
import copy

import pytest
import timm
import torch
from PIL import Image
from recorded_on_cpu import RecordedOnCPU

from l2r2_models import IFAM, L2R2Error, Predictor
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.models.masking import token_features
from l2r2_models.models.packed_graphs import CAPACITIES, TRAINED, PackedGraphs

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
VITS = {"plain": ("vit_tiny_patch16_224", {"img_size": 64}), "eva": ("vit_small_patch16_dinov3", {"init_values": 1.0})}
BOXES = [[0, 0, 40, 40], [20, 8, 60, 60], [0, 0, 64, 64], [3, 3, 6, 6], [16, 16, 33, 33]]


def vit(kind):
    torch.manual_seed(0)
    name, own = VITS[kind]
    backbone = timm.create_model(name, num_classes=0, **TINY, **own).eval()
    for parameter in backbone.blocks.parameters():  # attention far from uniform, so that positions matter
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def masks(batch, side, seed):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(batch, 1, 1, generator=generator)
    return (torch.rand(batch, side, side, generator=generator) < share).float()


@pytest.mark.parametrize("kind", VITS)
def test_features_are_the_same_and_the_number_of_graphs_is_bounded(kind):
    backbone = vit(kind)
    graphs = PackedGraphs(backbone, 3)
    with torch.inference_mode():
        for seed in range(30):
            x, mask = torch.randn(3, 3, 64, 64), masks(3, 4, seed)
            expected, seen = token_features(backbone, x, mask, 0.5)
            with graphs.replayed():
                got, also_seen = token_features(backbone, x, mask, 0.5)
            assert torch.allclose(got, expected, atol=1e-5) and torch.equal(seen, also_seen)
    assert 2 < len(graphs._runners) <= CAPACITIES


def test_only_that_vit_at_that_batch_size_without_gradients():
    backbone, other = vit("plain"), vit("plain")
    graphs = PackedGraphs(backbone, 3)

    def used(net, batch, inside=True):
        graphs._runners.clear()
        x, mask = torch.randn(batch, 3, 64, 64), torch.ones(batch, 4, 4)
        if inside:
            with graphs.replayed():
                token_features(net, x, mask, 0.5)
        else:
            token_features(net, x, mask, 0.5)
        return bool(graphs._runners)

    with torch.inference_mode():
        assert used(backbone, 3)
        assert not used(backbone, 2) and not used(other, 3) and not used(backbone, 3, inside=False)
    assert not used(backbone, 3)


def write_run(folder, name="l2r2_masked_vit_small_patch16_224", **options):
    torch.manual_seed(0)
    save_checkpoint(timm.create_model(name, num_classes=3, **options), folder, ["a", "b", "c"])
    return load_checkpoint(folder)


def photos(count):
    return [Image.effect_noise((64, 64), 60 + 10 * i).convert("RGB") for i in range(count)]


def test_a_predictor_with_graphs_predicts_the_same_without_a_gpu(tmp_path):
    checkpoint = write_run(tmp_path / "run", img_size=64, **TINY)
    plain, fast = (Predictor(checkpoint, batch_size=2, device="cpu", cuda_graphs=g) for g in (False, True))
    images, boxes = photos(5), [[box] for box in BOXES]
    for a, b in zip(plain(images, boxes), fast(images, boxes)):
        assert a.label == b.label and a.objects[0].score == pytest.approx(b.objects[0].score, abs=1e-5)
        assert a.objects[0].reason == b.objects[0].reason
    assert fast.network.graphs._runners


def test_models_that_drop_no_tokens_are_refused(tmp_path):
    with pytest.raises(L2R2Error, match="cuda_graphs is for models that drop tokens"):
        Predictor(write_run(tmp_path / "run", "l2r2", backbone="resnet10t"), cuda_graphs=True)


def trained(net, x, mask, graphs=None):
    """The features, and the gradients of all weights, of a pass with all tokens and one of those under a mask."""
    net.zero_grad()
    full = net(x)
    if graphs is None:
        fg, _ = token_features(net, x, mask, 0.5)
    else:
        with graphs.replayed():
            fg, _ = token_features(net, x, mask, 0.5)
    (full.square().mean() + fg.square().mean()).backward()
    return [fg.detach().clone(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", VITS)
def test_a_training_step_has_the_same_gradients_and_the_number_of_graphs_is_bounded(kind):
    backbone = vit(kind).train()
    twin = copy.deepcopy(backbone)
    graphs = PackedGraphs(backbone, 3, training=True, memory=RecordedOnCPU())
    for seed in range(16):
        x, mask = torch.randn(3, 3, 64, 64), masks(3, 4, seed)
        got, expected = trained(backbone, x, mask, graphs), trained(twin, x, mask)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert 2 < len(graphs._runners) <= TRAINED and graphs.memory.replayed > 16
    assert graphs.memory.recorded == 2 * len(graphs._runners)


def test_training_graphs_are_only_for_full_batches_with_gradients():
    backbone = vit("plain").train()
    graphs = PackedGraphs(backbone, 3, training=True, memory=RecordedOnCPU())
    with graphs.replayed():
        for batch in (2, 4):
            token_features(backbone, torch.randn(batch, 3, 64, 64), torch.ones(batch, 4, 4), 0.5)
        with torch.no_grad():  # an evaluation between epochs
            token_features(backbone, torch.randn(3, 3, 64, 64), torch.ones(3, 4, 4), 0.5)
        with torch.inference_mode():
            token_features(backbone, torch.randn(3, 3, 64, 64), torch.ones(3, 4, 4), 0.5)
    assert not graphs._runners


def test_the_second_stage_of_an_ifam_model_in_training():
    """All its tokens are computed, with a gradient for the weight of each as a key; a second pass runs eagerly."""
    torch.manual_seed(0)
    net = IFAM("vit_tiny_patch16_224", num_classes=3, num_parts=3, part_dropout=0.0, img_size=64, **TINY).train()
    twin = copy.deepcopy(net)
    graphs = PackedGraphs(net.backbone_of("fg"), 2, training=True, memory=RecordedOnCPU())
    for passes, replays in ((1, 2), (1, 4), (2, 6)):
        views = [torch.randn(2, 3, 64, 64) for _ in range(passes)]
        for model, used in ((net, True), (twin, False)):
            model.zero_grad()
            torch.manual_seed(passes)  # stage 1 draws the parts
            with graphs.replayed() if used else contextlib.nullcontext():
                sum(model.forward_views(full=view).fg.square().sum() for view in views).backward()
        for (name, ours), theirs in zip(net.named_parameters(), twin.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        assert graphs.memory.replayed == replays


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["l2r2_masked_vit_small_patch16_224", "l2r2_masked_eva02_small_patch14_336"])
def test_a_predictor_replays_graphs_on_a_gpu(tmp_path, name):
    checkpoint = write_run(tmp_path / "run", name, img_size=112, **TINY)
    plain, fast = (Predictor(checkpoint, batch_size=2, device="cuda", cuda_graphs=g) for g in (False, True))
    images, boxes = photos(5) * 3, [[box] for box in BOXES] * 3
    for a, b in zip(plain(images, boxes), fast(images, boxes)):
        assert a.objects[0].score == pytest.approx(b.objects[0].score, abs=1e-3)
    assert all(runner._graph is not None for runner in fast.network.graphs._runners.values())

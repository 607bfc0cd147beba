"""iFAM: parts found without masks, the hard mask and its gradient, the losses, interventions, and use in a run."""

import pytest
import timm
import torch

from l2r2_models import L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.models.parts import PartDiscovery, PartWeights, entropy_loss, part_losses
from l2r2_models.train.losses import BranchLoss
from l2r2_models.views import ViewSpec

SMALL = {"img_size": 64, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}


def ifam(**options):
    torch.manual_seed(0)
    return timm.create_model("ifam_vit_tiny_patch16_224", num_classes=5, **{**SMALL, "num_parts": 3, **options}).eval()


def images(count=3):
    return torch.randn(count, 3, 64, 64)


# ---- stage 1 ----


def test_part_maps_by_a_naive_loop():
    torch.manual_seed(0)
    discovery, x = PartDiscovery(6, 2).eval(), torch.randn(2, 4, 6)
    found = discovery(x, (2, 2))
    for b in range(2):
        for n in range(4):
            minus = torch.stack([-(x[b, n] - a).square().sum() for a in discovery.prototypes])
            assert torch.allclose(found.logits[b, :, n // 2, n % 2], minus, atol=1e-5)
            assert torch.allclose(found.maps[b, :, n // 2, n % 2], minus.softmax(0), atol=1e-5)
            assert found.keep[b, n // 2, n % 2] == (minus.argmax() < 2)
        for k in range(2):
            weights = found.maps[b, k].flatten()
            assert torch.allclose(found.vectors[b, k], (weights[:, None] * x[b]).sum(0) / weights.sum(), atol=1e-4)


def test_noise_in_training_only():
    discovery, x = PartDiscovery(6, 3), torch.randn(1, 16, 6)
    assert not torch.equal(discovery(x, (4, 4)).maps, discovery(x, (4, 4)).maps)
    assert torch.equal(discovery.eval()(x, (4, 4)).maps, discovery(x, (4, 4)).maps)
    net = ifam()
    assert torch.equal(net(images_ := images()), net(images_))


def test_the_noise_draws_each_part_with_its_probability():
    """Gumbel-max: with noise of the other sign the most probable part would be drawn too seldom."""
    discovery = PartDiscovery(2, 2).train()
    with torch.no_grad():
        discovery.prototypes.copy_(torch.tensor([[1.5, 0.0], [0.0, 0.8], [0.2, 0.2]]).sqrt())
        found = discovery(torch.zeros(1, 40_000, 2), (200, 200))
    drawn = found.maps.argmax(1).flatten().bincount(minlength=3) / 40_000
    assert torch.allclose(drawn, found.logits[0, :, 0, 0].softmax(0), atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_predicts(dtype):
    """As a model of this dtype, and under autocast."""
    net, x = ifam(), images()
    expected = net(x)
    half = ifam().to(dtype)
    with torch.no_grad():
        assert half(x.to(dtype)).dtype == dtype
        with torch.autocast("cpu", dtype):
            cast = net(x)
        # a patch near the border of two parts may fall on the other side
        assert torch.corrcoef(torch.stack([cast.float().flatten(), expected.flatten()]))[0, 1] > 0.9
    out = half.train().forward_views(x.to(dtype))
    (out.full.float().square().mean() + out.fg.float().square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parts.parameters())


def test_stage_1_averages_over_the_parts_that_are_not_dropped():
    discovery, head = PartDiscovery(6, 3).eval(), torch.nn.Linear(6, 4, bias=False)
    vectors = torch.randn(2, 3, 6)
    each = head(discovery.norm(vectors))
    assert torch.allclose(discovery.classify(vectors, head), each.mean(1), atol=1e-6)
    assert torch.allclose(discovery.classify(vectors, head, (1,)), each[:, [0, 2]].mean(1), atol=1e-6)


def test_part_dropout_never_drops_every_part():
    discovery, head = PartDiscovery(6, 1, dropout=0.9).train(), torch.nn.Linear(6, 4, bias=False)
    assert (discovery.classify(torch.randn(64, 1, 6), head).abs().sum(1) > 0).all()


# ---- the mask and its gradient ----


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_of_stage_2_reaches_stage_1(shared):
    """Through the mask alone: with separate backbones there is no other way."""
    net = ifam(shared=shared).train()
    net.forward_views(images()).fg.square().sum().backward()
    assert net.parts.prototypes.grad.abs().sum() > 0
    if not shared:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.backbone.blocks[0].mlp.parameters())


def test_the_hard_mask_is_a_hard_mask():
    """Patches of the background change nothing in stage 2, whose answer is that of the mask given by hand."""
    net, x = ifam(), images(1)
    out = net.forward_views(x)
    keep = out.parts.keep
    assert keep.any() and not keep.all()
    assert torch.allclose(net.forward_views(x, mask=keep).fg, out.fg, atol=1e-5)
    outside = ~keep.repeat_interleave(8, 1).repeat_interleave(8, 2)
    other = torch.where(outside[:, None], torch.randn_like(x), x)
    assert torch.allclose(net.forward_views(other, mask=keep).fg, out.fg, atol=1e-5)


def test_a_pixel_of_the_mask_pulls_its_foreground_score():
    """Straight-through: the gradient of a patch's bit, kept or not, is the gradient of the sum of its foreground maps."""
    net = ifam(shared=False).train()
    torch.manual_seed(3)
    out = net.forward_views(images(1))
    soft = out.parts.maps
    (grad,) = torch.autograd.grad(out.fg.sum(), soft, retain_graph=True)
    keep = out.parts.keep[0]
    assert torch.allclose(grad[0, 0], grad[0, 1]) and torch.allclose(grad[0, 0], grad[0, 2])  # every part alike
    assert (grad[0, 0] != 0).all() and keep.any() and not keep.all() and (grad[0, 3] == 0).all()


# ---- answers ----


def test_the_prediction_is_that_of_stage_2_if_it_sees_a_patch():
    net, x = ifam(), images()
    with torch.no_grad():
        net.parts.prototypes[3] = 100  # far away: nothing is background
        out = net.forward_views(x)
        assert out.has_fg.all() and torch.equal(out.fused, out.fg) and torch.equal(net(x), out.fg)
        net.parts.prototypes[:3] = 200  # every patch is background
        out = net.forward_views(x)
    assert not out.has_fg.any() and torch.equal(out.fused, out.full) and out.fg.isfinite().all()


def test_what_a_caller_says_about_the_object():
    net, x = ifam(), images()
    mask = torch.tensor([1.0, 1, 0])[:, None, None].expand(3, 9, 9)
    out = net.forward_views(x, has_fg=torch.tensor([True, False, True]), mask=mask)
    assert out.has_fg.tolist() == [True, False, False]
    assert torch.equal(out.fused[1:], out.full[1:])
    boxes = torch.tensor([[8.0, 8, 40, 40], [float("nan")] * 4, [0, 0, 64, 64]])
    assert torch.equal(net(x, boxes)[1], net.forward_views(x).full[1])


def test_misuse_is_named():
    net, x = ifam(), images()
    for views in ({"full": x, "fg": x}, {"full": x, "bg": x}, {"fg": x}, {}):
        with pytest.raises(L2R2Error, match="whole image"):
            net.forward_views(**views)
    with pytest.raises(L2R2Error, match="multiple of 8"):
        ifam(dynamic_img_size=True)(torch.randn(1, 3, 60, 64))
    with pytest.raises(L2R2Error, match="num_parts"):
        ifam(num_parts=0)
    with pytest.raises(L2R2Error, match="branches"):
        ifam(branches=("full",))
    with pytest.raises(L2R2Error, match="crop"):
        ifam(views=ViewSpec(size=64))
    with pytest.raises(L2R2Error, match="does not support interventions"), net.intervened(drop_parts=[0]):
        torch.jit.script(net)
    with pytest.raises(L2R2Error, match="cannot be traced by torch"):
        torch.jit.trace(net.eval(), images())
    with pytest.raises(ValueError, match="whole images only"):
        torch.fx.symbolic_trace(net)(images(), torch.tensor([[0.0, 0, 9, 9]] * 2))


def test_one_part():
    net = ifam(num_parts=1).train()
    out = net.forward_views(images())
    losses = part_losses(out.parts, PartWeights(), images(), net.find_parts)
    assert losses["orthogonality"] == 0 and all(v.isfinite() for v in losses.values())
    net(images()).mean().backward()


# ---- losses ----


def test_weights_choose_the_losses():
    net, x = ifam().train(), images()
    out = net.forward_views(x)
    only = PartWeights(*([0.0] * 3), entropy=2.0, orthogonality=0.0, background=0.0)
    losses = part_losses(out.parts, only, x, net.find_parts)
    assert set(losses) == {"entropy"} and torch.allclose(losses["entropy"], 2 * entropy_loss(out.parts.maps))
    with pytest.raises(L2R2Error, match="part_presence"):
        PartWeights(presence=-1)


def test_equivariance_runs_stage_1_only():
    net, x, runs = ifam(shared=False).train(), images(), []
    net.branch_backbones["fg"].blocks[0].norm1.register_forward_hook(lambda *_: runs.append("stage 2"))
    net.backbone.blocks[0].norm1.register_forward_hook(lambda *_: runs.append("stage 1"))
    BranchLoss(net).train()(torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool), full=x)
    assert sorted(runs) == ["stage 1", "stage 1", "stage 2"]


def test_the_parts_of_a_batch_add_up():
    """Gradient accumulation: two halves with the counts of the whole give the whole's loss, but for what a batch shares."""
    net, x, labels = ifam(part_dropout=0.0).train(), images(4), torch.arange(4)
    net.parts.eval()  # no noise
    loss = BranchLoss(net, part_weights=PartWeights(presence=0.0, equivariance=0.0))
    loss.training = True
    found = torch.ones(4, dtype=torch.bool)
    whole = loss(labels, found, full=x)["loss"]
    counts = torch.tensor([4.0, 4.0])
    halves = [loss(labels[h], found[h], full=x[h], counts=counts)["loss"] for h in (slice(0, 2), slice(2, 4))]
    assert torch.allclose(sum(halves), whole, atol=1e-4)


# ---- interventions ----


def test_dropped_parts_leave_the_mask():
    net, x = ifam(), images()
    before = net.forward_views(x).parts
    part = before.logits.argmax(1)
    with net.intervened(drop_parts=[1]):
        after = net.forward_views(x)
    assert torch.equal(after.parts.keep, before.keep & (part != 1))
    assert net.dropped_parts == () and torch.equal(net.forward_views(x).parts.keep, before.keep)
    with net.intervened(drop_parts=range(2)):
        assert torch.equal(net.forward_views(x).parts.keep, before.keep & (part == 2))
    with pytest.raises(L2R2Error, match="All 3 parts"), net.intervened(drop_parts=range(3)):
        net.forward_views(x)
    with pytest.raises(L2R2Error, match="no part 3"), net.intervened(drop_parts=[3]):
        net.forward_views(x)


def test_low_confidence_tokens_by_the_training_quantiles(tmp_path):
    net, train, x = ifam(), images(8), images()
    with pytest.raises(L2R2Error, match="quantiles"), net.intervened(token_quantile=0.3):
        net(x)
    net.store_quantiles([train[:5], train[5:]])
    found = net.find_parts(train)
    best, part = found.logits.max(1)
    with net.intervened(token_quantile=0.3):
        kept = net.forward_views(train).parts.keep
    for k in range(3):
        level = torch.quantile(best[part == k], 0.3)
        assert torch.equal(kept[part == k], best[part == k] >= level)
    net.view_spec = ViewSpec.from_pretrained_cfg(net.pretrained_cfg, size=64, fg_mode="parts")
    save_checkpoint(net, tmp_path, [str(i) for i in range(5)])
    loaded = load_checkpoint(tmp_path).model
    with net.intervened(token_quantile=0.5), loaded.intervened(token_quantile=0.5):
        assert torch.equal(net(x), loaded(x))
    with pytest.raises(L2R2Error, match="token_quantile"), net.intervened(token_quantile=1.5):
        net(x)


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}])
def test_a_scripted_and_saved_model_and_an_fx_graph_predict_the_same(options, tmp_path):
    net, x = ifam(**options).eval(), images()
    with torch.no_grad():
        net.parts.prototypes.normal_()  # so that some patches are dropped, and some kept
        torch.jit.save(torch.jit.script(net), tmp_path / "ifam.pt")
        scripted = torch.jit.load(tmp_path / "ifam.pt")
        kept = net.find_parts(x).keep.float().mean()
        assert 0 < kept < 1
        assert torch.allclose(scripted(x), net(x), atol=1e-4)
        assert torch.allclose(torch.fx.symbolic_trace(net)(x), net(x), atol=1e-4)
    with pytest.raises(Exception, match="a scripted iFAM model cannot be trained"):
        scripted.train()(x)


def test_the_gradient_of_a_training_graph_is_the_models():
    net, x = ifam(part_dropout=0.0).train(), images()
    grads = []
    for model in (net, torch.fx.symbolic_trace(net)):
        torch.manual_seed(0)
        net.zero_grad()
        model(x).square().sum().backward()
        grads.append(net.parts.prototypes.grad.clone())
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5) and grads[0].abs().sum() > 0

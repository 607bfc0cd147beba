"""iFAM on networks with rotary embeddings (timm's Eva: EVA-02, DINOv3, PE spatial) and on NaFlexViT, against dense references."""

import pytest
import torch

from l2r2_models import L2R2Error
from l2r2_models.models.ifam import IFAM

SMALL = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}
BACKBONES = {
    "EVA-02": ("eva02_small_patch14_336", {"img_size": 56}),
    "EVA-02 with its class token": ("eva02_tiny_patch14_224", {"img_size": 56, "global_pool": "token"}),
    "DINOv3": ("vit_small_patch16_dinov3", {"init_values": 1.0}),
    "PE spatial": ("vit_pe_spatial_tiny_patch16_512", {}),
    "rope of each block": ("vit_small_patch16_rope_mixed_224", {"init_values": 1.0}),
    "NaFlexViT": ("naflexvit_base_patch16_gap", {}),
}


@pytest.fixture(params=BACKBONES)
def net(request):
    return ifam(request.param)


def ifam(kind, **options):
    """The generic architecture; heads and attention far from uniform, so that positions and masks matter."""
    torch.manual_seed(0)
    name, own = BACKBONES[kind]
    model = IFAM(name, num_classes=5, num_parts=3, **{**SMALL, **own, **options})
    for vit in {id(v): v for v in (model.backbone_of("full"), model.backbone_of("fg"))}.values():
        for block in vit.blocks:
            for parameter in block.attn.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.heads["fg"].weight, std=0.5)
    return model.eval()


def images(net, count=3):
    torch.manual_seed(1)
    return torch.randn(count, 3, net.view_spec.size, net.view_spec.size)


def dense(vit, x, keep):
    """Timm's own blocks on all tokens, with dropped patches masked as keys; the mean over kept patches, or the class token."""
    prefix = vit.num_prefix_tokens
    keys = torch.cat([keep.new_ones(len(keep), prefix), keep], 1)[:, None, None]
    if hasattr(vit, "_pos_embed"):
        tokens, rope = vit._pos_embed(vit.patch_embed(x))
        tokens = vit.norm_pre(tokens)
    else:
        tokens, rope = vit.norm_pre(vit.embeds(x)[0]), None
    for i, block in enumerate(vit.blocks):
        at = {} if rope is None else {"rope": rope[i] if rope.ndim == 4 else rope}
        tokens = block(tokens, attn_mask=keys, **at)
    tokens = vit.norm(tokens)
    if vit.global_pool == "token":
        pooled = tokens[:, 0]
    else:
        pooled = (tokens[:, prefix:] * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
    return vit.head_drop(vit.fc_norm(pooled))


def test_stage_1_sees_what_timms_network_computes(net):
    x = images(net)
    out = net.forward_views(x)
    features = net.backbone.forward_features(x)[:, net.backbone.num_prefix_tokens :]
    expected = net.parts(features, tuple(out.parts.keep.shape[1:]))
    torch.testing.assert_close(out.parts.logits, expected.logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.full, net.parts.classify(expected.vectors, net.heads["full"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_stage_2_is_the_dense_pass_with_dropped_keys(kind, shared):
    net = ifam(kind, shared=shared)
    x = images(net)
    grid = net.forward_views(x).parts.keep.shape[1:]
    mask = torch.rand(len(x), *grid, generator=torch.Generator().manual_seed(2)) > 0.5
    found, given = net.forward_views(x), net.forward_views(x, mask=mask)
    assert mask.any() and not mask.all()
    for out in (found, given):
        keep = out.parts.keep.flatten(1)
        rows = keep.any(1)
        expected = net.heads["fg"](dense(net.backbone_of("fg"), x[rows], keep[rows]))
        torch.testing.assert_close(out.fg[rows], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given.fg, net.forward_views(x, mask=~mask).fg, atol=1e-3)


def test_the_loss_of_stage_2_reaches_stage_1_and_checkpointing_changes_nothing(net):
    x = images(net)
    before = net(x)
    net.set_grad_checkpointing()
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-5)
    net.train().forward_views(x).fg.square().sum().backward()
    assert net.parts.prototypes.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.backbone.blocks.parameters())


def test_the_straight_through_value_is_that_of_the_dropped_tokens(net):
    """In training all tokens are computed, with weights 1 and 0."""
    x = images(net, 1)
    mask = net.forward_views(x).parts.keep
    torch.manual_seed(5)
    out = net.train().forward_views(x)
    again = net.eval().forward_views(x, mask=out.parts.keep)
    torch.testing.assert_close(out.fg, again.fg, atol=1e-5, rtol=1e-5)
    assert mask.shape == out.parts.keep.shape


def test_a_naflexvit_cannot_be_scripted():
    with pytest.raises(L2R2Error, match=r"naflexvit_base_patch16_gap cannot be scripted by torch\.jit; use torch.export"):
        torch.jit.script(ifam("NaFlexViT"))


def test_a_run_is_trained_and_loaded_again(dataset, tmp_path, l2r2):
    sizes = '{"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 56}'
    options = ("--model", "ifam_eva02_small_patch14_336", "--no-pretrained", "--size", 56, "--set", f"backbone={sizes}")
    done = l2r2("finetune", dataset, *options, "--epochs", 1, "--batch-size", 6, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert l2r2("evaluate", tmp_path / "run", dataset, "--split", "test").returncode == 0

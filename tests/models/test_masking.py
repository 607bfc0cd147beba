"""fg masked inside the network: late features, token masks packed and by keys, masks of every size, the fallback."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from l2r2_models import L2R2Error, make_views
from l2r2_models.models.ifam import IFAM
from l2r2_models.models.masking import (
    check_tokens_backbone,
    coverage,
    embed_tokens,
    kept_patches,
    patch_grid,
    run_tokens,
    token_features,
)

VIT = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}
VITS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "init_values": 1.0}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "average beside a class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "average with the class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "EVA-02": ("eva02_small_patch14_336", {"img_size": 56}),
    "EVA-02 with its class token": ("eva02_tiny_patch14_224", {"img_size": 56, "global_pool": "token"}),
    "DINOv3": ("vit_small_patch16_dinov3", {"init_values": 1.0}),  # any image size, register tokens
    "PE": ("vit_pe_spatial_tiny_patch16_512", {}),
    "rope of each block": ("vit_small_patch16_rope_mixed_224", {"init_values": 1.0}),
    "NaFlexViT": ("naflexvit", {"global_pool": "avg", "reg_tokens": 4, "fc_norm": True}),
    "NaFlexViT with rope": ("naflexvit", {"rope_type": "axial", "class_token": True, "global_pool": "token", "pre_norm": True}),
}
SIDE = {"registers": 56, "EVA-02": 56, "EVA-02 with its class token": 56}


def vit(kind, **options):
    torch.manual_seed(0)
    name, own = VITS[kind]
    if name == "naflexvit":  # timm registers none that is small
        backbone = NaFlexVit(NaFlexVitCfg(depth=3, embed_dim=48, num_heads=3, **own), num_classes=0).eval()
    else:
        backbone = timm.create_model(name, num_classes=0, **{**VIT, **own, **options}).eval()
    if getattr(backbone, "rope", None) is not None:
        for block in backbone.blocks:  # attention far from uniform, so that positions matter
            for parameter in block.attn.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def model(backbone="resnet10t", **options):
    torch.manual_seed(0)
    return timm.create_model("l2r2", backbone=backbone, num_classes=4, **options).eval()


def box_mask(size=64, box=(10, 6, 44, 50)):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, box[1] : box[3], box[0] : box[2]] = True
    return mask


# ---- masks on a grid ----


def test_coverage_is_the_mean_over_each_patch():
    mask = torch.rand(2, 48, 32) > 0.4
    naive = torch.tensor([[[m[r : r + 16, c : c + 16].float().mean() for c in (0, 16)] for r in (0, 16, 32)] for m in mask])
    assert torch.allclose(coverage(mask.float(), (3, 2)), naive)


def test_a_mask_of_another_size_keeps_the_same_patches():
    small = torch.zeros(1, 4, 4, dtype=torch.bool)
    small[0, 1:3, 2:] = True
    large = small.repeat_interleave(24, 1).repeat_interleave(24, 2)
    for mask in (small, large):
        assert torch.equal(kept_patches(mask.float(), (4, 4), 0.25), small.flatten(1))


def test_the_threshold_is_a_part_of_the_patch_and_nothing_is_never_kept():
    mask = torch.zeros(1, 32, 32)
    mask[0, :16, :4] = 1  # a quarter of the first patch
    assert kept_patches(mask, (2, 2), 0.25).tolist() == [[True, False, False, False]]
    assert not kept_patches(mask, (2, 2), 0.26).any()
    assert kept_patches(mask, (2, 2), 0.0).tolist() == [[True, False, False, False]]


# ---- tokens ----


@pytest.mark.parametrize("kind", VITS)
def test_packed_and_masked_keys_give_the_tokens_of_timm_with_masked_keys(kind):
    backbone, size = vit(kind), SIDE.get(kind, 64)
    x, grid = torch.randn(3, 3, size, size), patch_grid(backbone, size, size)
    keep = torch.rand(3, math.prod(grid)) < torch.tensor([0.2, 0.6, 1.0])[:, None]
    keep[0, 0] = True
    with torch.inference_mode():
        embedded, prefixes = embed_tokens(backbone, x), backbone.num_prefix_tokens
        keys = torch.nn.functional.pad(keep, (prefixes, 0), value=True)
        timm_own = backbone.forward_features(x, attn_mask=keys[:, None, None])
        for packed in (True, False):
            got = run_tokens(backbone, embedded, keep, packed=packed)
            assert torch.allclose(got.prefix, timm_own[:, :prefixes], atol=1e-5)
            assert torch.allclose(got.patches, torch.where(keep[..., None], timm_own[:, prefixes:], 0), atol=1e-5)
        everything = run_tokens(backbone, embedded, torch.ones_like(keep))
        assert torch.allclose(torch.cat([everything.prefix, everything.patches], 1), backbone.forward_features(x), atol=1e-5)


@pytest.mark.parametrize("kind", VITS)
def test_all_patches_give_the_whole_image_and_dropped_ones_do_not_matter(kind):
    backbone, size = vit(kind), SIDE.get(kind, 64)
    x, mask = torch.randn(2, 3, size, size), torch.zeros(2, size, size)
    mask[:, : size // 2, : size // 2] = 1  # whole patches
    with torch.inference_mode():
        all_of_it, _ = token_features(backbone, x, torch.ones_like(mask), 0.25)
        assert torch.allclose(all_of_it, backbone(x), atol=1e-5)
        outside = torch.where(mask[:, None].bool(), x, torch.randn_like(x) * 50)
        seen, _ = token_features(backbone, x, mask, 0.25)
        assert torch.allclose(seen, token_features(backbone, outside, mask, 0.25)[0], atol=1e-5)
        assert not torch.allclose(seen, backbone(x), atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "DINOv3"])
def test_gradients_of_packed_and_masked_keys_agree_in_training(kind):
    grads = []
    for packed in (True, False):
        backbone = vit(kind).train()
        torch.manual_seed(1)
        features, _ = token_features(backbone, torch.randn(2, 3, 64, 64), box_mask().float().repeat(2, 1, 1), 0.25, packed=packed)
        features.square().sum().backward()
        grads.append([p.grad for p in backbone.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*grads))


def test_one_patch_is_enough():
    net = model("vit_tiny_patch16_224", fg_mode="tokens", **VIT)
    out = net.forward_views(torch.randn(1, 3, 64, 64), mask=box_mask(box=(0, 0, 16, 16)))
    assert out.has_fg.all() and out.fg.isfinite().all()


@pytest.mark.parametrize(
    ("backbone", "options", "why"),
    [
        ("resnet10t", {}, "ResNet is none of timm's VisionTransformer"),
        ("eva02_tiny_patch14_224", {"img_size": 56, "global_pool": "max"}, "max"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, "VisionTransformerDistilled"),
        ("vit_tiny_patch16_224", {**VIT, "global_pool": "max"}, "max"),
        ("vit_tiny_patch16_224", {**VIT, "patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 1}, "HybridEmbed"),
    ],
)
def test_backbones_that_cannot_drop_tokens_are_refused_by_name(backbone, options, why):
    with pytest.raises(L2R2Error, match=rf"{backbone}.*{why}"):
        model(backbone, fg_mode="tokens", **options)
    net = model(backbone, **{k: v for k, v in options.items() if k != "patch_drop_rate"})
    if why != "patch_drop_rate":
        with pytest.raises(L2R2Error, match=backbone):
            net.view_spec = replace(net.view_spec, fg_mode="tokens")


def test_networks_that_ifam_or_tokens_do_not_support_are_refused_by_name():
    naflex = NaFlexVit(NaFlexVitCfg(embed_dim=48, depth=1, num_heads=3, global_pool="map"))
    with pytest.raises(L2R2Error, match=r'naflexvit_base_patch16_map cannot drop tokens: its pooling "map" .*; choose'):
        check_tokens_backbone(naflex, "naflexvit_base_patch16_map")
    with pytest.raises(L2R2Error, match="resnet10t cannot drop tokens: its class ResNet is none of"):
        IFAM("resnet10t", num_classes=2)


def test_blocks_of_another_kind_are_refused():
    net = model("vit_tiny_patch16_224", fg_mode="tokens", **VIT, block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(L2R2Error, match="ParallelScalingBlock"):
        net.forward_views(torch.randn(1, 3, 64, 64), mask=box_mask())


def test_a_side_that_is_no_multiple_of_the_patch_is_named():
    net = model("vit_tiny_patch16_224", fg_mode="tokens", **{**VIT, "dynamic_img_size": True})
    with pytest.raises(L2R2Error, match=r"70 pixels .* multiple of 16, e.g. 80"):
        net.forward_views(torch.randn(1, 3, 70, 70), mask=box_mask(70))
    assert patch_grid(net.backbone, 96, 48) == (6, 3)
    assert net.forward_views(torch.randn(1, 3, 96, 48), mask=torch.ones(1, 96, 48)).fg.shape == (1, 4)


# ---- late ----

LATE = {
    "resnet10t": {},
    "convnextv2_atto": {},
    "efficientnet_b0": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("stage", ["last", "before_last"])
@pytest.mark.parametrize("backbone", LATE)
def test_late_masking_by_hand(backbone, stage):
    """Against the features of the stages, computed one after the other."""
    net = model(backbone, fg_mode="late", **LATE[backbone])
    net.view_spec = replace(net.view_spec, late_stage=stage, late_pool="mask")
    x, mask = torch.randn(2, 3, 64, 64), box_mask().repeat(2, 1, 1)
    seen = []
    with torch.inference_mode():
        whole = net.forward_views(full=x)
        handle = net.backbone.register_forward_hook(lambda *_: seen.append("pass"))
        out = net.forward_views(x, mask=mask)
        handle.remove()
        assert torch.allclose(out.full, whole.full, atol=1e-5)
        everything = net.forward_views(x, mask=torch.ones(2, 64, 64))
        assert torch.allclose(everything.fg, net.forward_branches(fg=x)["fg"], atol=1e-5)
        if stage == "last":
            features = net.backbone.forward_features(x)
            if getattr(net.backbone, "output_fmt", "NCHW") == "NHWC":
                features = features.permute(0, 3, 1, 2)
            weights = coverage(mask.float(), tuple(features.shape[2:]))[:, None]
            mean = (features * weights).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True)
            constant = mean.expand_as(features)  # the mean over constant features is the masked mean
            if getattr(net.backbone, "output_fmt", "NCHW") == "NHWC":
                constant = constant.permute(0, 2, 3, 1)
            expected = net.heads["fg"](net.backbone.forward_head(constant, pre_logits=True))
            assert torch.allclose(out.fg, expected, atol=1e-4)


@pytest.mark.parametrize("stage", ["last", "before_last"])
def test_late_masking_is_one_pass_for_both_branches(stage):
    net, rows = model(fg_mode="late"), []
    net.view_spec = replace(net.view_spec, late_stage=stage)
    stages = [net.backbone.conv1[0], net.backbone.layer3, net.backbone.layer4]
    handles = [m.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0]))) for m in stages]
    net.forward_views(torch.randn(3, 3, 64, 64), mask=box_mask().repeat(3, 1, 1))
    assert rows == [3, 3, 3 if stage == "last" else 6]
    for handle in handles:
        handle.remove()


def test_late_pooling_over_all_positions_is_the_zeroed_mean():
    net = model(fg_mode="late")
    net.view_spec = replace(net.view_spec, late_pool="all")
    x, mask = torch.randn(2, 3, 64, 64), box_mask().repeat(2, 1, 1)
    with torch.inference_mode():
        features = net.backbone.forward_features(x)
        expected = net.heads["fg"]((features * coverage(mask.float(), (2, 2))[:, None]).mean((2, 3)))
        assert torch.allclose(net.forward_views(x, mask=mask).fg, expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["mask", "all", "token"])
def test_late_masking_of_a_vit(pool):
    net = model("vit_tiny_patch16_224", fg_mode="late", **VIT)
    net.view_spec = replace(net.view_spec, late_stage="before_last", late_pool=pool)
    x, mask, backbone = torch.randn(2, 3, 64, 64), box_mask().repeat(2, 1, 1), net.backbone
    with torch.inference_mode():
        out = net.forward_views(x, mask=mask)
        tokens = backbone.blocks[:-1](embed_tokens(backbone, x).tokens)
        weights = coverage(mask.float(), (4, 4)).flatten(1)[..., None]
        last = backbone.norm(backbone.blocks[-1](torch.cat([tokens[:, :1], tokens[:, 1:] * weights], 1)))
        pooled = {
            "token": last[:, 0],
            "all": last[:, 1:].mean(1),
            "mask": (last[:, 1:] * weights).sum(1) / weights.sum(1),
        }[pool]
        assert torch.allclose(out.fg, net.heads["fg"](pooled), atol=1e-5)
        assert torch.allclose(out.full, net.forward_branches(full=x)["full"], atol=1e-5)


@pytest.mark.parametrize("stage", ["last", "before_last"])
def test_a_mask_of_other_proportions_masks_the_same_patches(stage):
    net = model("vit_tiny_patch16_224", fg_mode="late", **VIT)
    net.view_spec = replace(net.view_spec, late_stage=stage)
    x, half = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64)
    half[:, :, :32] = 1
    left, right = (net.forward_views(x, mask=m).fg for m in (half, half.flip(2)))
    for rows, columns in ((4, 16), (64, 2), (2, 32)):
        small = torch.zeros(1, rows, columns)
        small[:, :, : columns // 2] = 1
        assert torch.allclose(net.forward_views(x, mask=small).fg, left, atol=1e-6)
    assert not torch.allclose(left, right, atol=1e-3)
    net.forward_views(x, mask=torch.rand(1, 100, 37))  # of any proportions


@pytest.mark.parametrize(
    ("backbone", "options", "spec", "why"),
    [
        ("mixer_s32_224", {}, {}, "MlpMixer cannot be masked late: it does not pool tokens"),
        ("coat_lite_tiny", {}, {"late_stage": "before_last"}, "CoaT cannot be masked before its last stage"),
        ("cait_xxs24_224", {"img_size": 64, "depth": 2}, {}, "Cait cannot be masked late"),
    ],
)
def test_backbones_that_cannot_be_masked_late_are_refused_by_name(backbone, options, spec, why):
    net = model(backbone, **options).eval()
    size = 64 if options else 224
    with pytest.raises(L2R2Error, match=why):
        net.view_spec = replace(net.view_spec, fg_mode="late", **spec)
        net.forward_views(torch.randn(1, 3, size, size), mask=torch.ones(1, size, size))


def test_pooling_that_a_backbone_lacks_is_refused_by_name():
    for backbone, pool, options in (("resnet10t", "token", {}), ("resnet10t", "mask", {"global_pool": "max"})):
        net = model(backbone, **options)
        with pytest.raises(L2R2Error, match=backbone):
            net.view_spec = replace(net.view_spec, fg_mode="late", late_pool=pool)
    with pytest.raises(L2R2Error, match="before_last"):
        net = model("vit_tiny_patch16_224", **VIT)
        net.view_spec = replace(net.view_spec, fg_mode="late", late_pool="token")


def test_gradient_checkpointing_that_would_lose_the_mask_is_refused():
    net = model("vit_tiny_patch16_224", fg_mode="late", **VIT).train()
    net.view_spec = replace(net.view_spec, late_stage="before_last")
    net.set_grad_checkpointing()
    with pytest.raises(L2R2Error, match="checkpointing"):
        net.forward_views(torch.randn(2, 3, 64, 64), mask=box_mask().repeat(2, 1, 1))


# ---- the model with a mask ----

KINDS = {"late": ("resnet10t", {}), "tokens": ("vit_tiny_patch16_224", VIT)}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_an_object_fall_back_to_full_with_the_reason(kind, shared):
    backbone, options = KINDS[kind]
    net = model(backbone, fg_mode=kind, shared=shared, fusion="average", branches=("full", "fg", "bg"), **options)
    x, mask = torch.randn(3, 3, 64, 64), box_mask().repeat(3, 1, 1)
    mask[1] = False
    out = net.forward_views(x, has_fg=torch.tensor([True, True, False]), bg=x, mask=mask)
    assert out.has_fg.tolist() == [True, False, False]
    assert torch.equal(out.fused[1:], out.full[1:]) and not torch.equal(out.fused[0], out.full[0])
    assert set(out.branches()) == {"full", "fg", "bg"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_full_branch_the_image_comes_as_fg(kind):
    backbone, options = KINDS[kind]
    net = model(backbone, fg_mode=kind, branches=("fg", "bg"), **options)
    x = torch.randn(2, 3, 64, 64)
    spec = replace(net.view_spec, size=64)
    views = make_views([torch.zeros(40, 60, 3, dtype=torch.uint8)], torch.tensor([[3.0, 3, 30, 30]]), spec, branches=net.branches)
    assert views.full is None and views.fg.shape == (1, 3, 64, 64) and views.mask.shape == (1, 64, 64)
    assert net.forward_views(fg=x, bg=x, mask=box_mask().repeat(2, 1, 1)).fused.shape == (2, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_full_and_without_an_object_fg_gets_the_whole_image(kind):
    """Not one constant for all images."""
    backbone, options = KINDS[kind]
    net = model(backbone, fg_mode=kind, branches=("fg",), **options)
    x = torch.randn(2, 3, 64, 64)
    nothing, everything = (net.forward_views(fg=x, mask=torch.full((2, 64, 64), value)) for value in (0.0, 1.0))
    assert not nothing.has_fg.any() and torch.allclose(nothing.fused, everything.fused, atol=1e-5)
    assert torch.allclose(nothing.fused, net(x), atol=1e-5) and not torch.allclose(*nothing.fused, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_in_a_batch_become_masks(kind):
    backbone, options = KINDS[kind]
    net = model(backbone, fg_mode=kind, **options)
    x, boxes = torch.randn(2, 3, 64, 64), torch.tensor([[10.0, 6, 44, 50], [float("nan")] * 4])
    by_hand = net.forward_views(x, has_fg=torch.tensor([True, False]), mask=box_mask().repeat(2, 1, 1))
    assert torch.allclose(net(x, boxes), by_hand.fused, atol=1e-5)


def test_masks_that_do_not_fit_are_refused():
    net, x = model(fg_mode="late"), torch.randn(2, 3, 64, 64)
    bad = torch.rand(2, 64, 64)
    for mask, message in (
        (torch.ones(64, 64), r"\[B, h, w\]"),
        (torch.ones(3, 64, 64), "B = 2"),
        (bad.clone().index_put((torch.tensor(0), torch.tensor(3), torch.tensor(5)), torch.tensor(float("nan"))), "finite"),
        (bad - 1, r"in \[0, 1\]"),
        (bad * 255, r"in \[0, 1\]"),
        ((bad > 0.5).to(torch.uint8) * 255, r"in \[0, 1\]"),
    ):
        with pytest.raises(L2R2Error, match=message):
            net.forward_views(x, mask=mask)
    with pytest.raises(L2R2Error, match="whole image"):
        model(fg_mode="late", branches=("full", "fg", "bg")).forward_views(bg=x, mask=torch.ones(2, 64, 64))
    for other in (model(), model(branches="full", fg_mode="late")):
        with pytest.raises(L2R2Error, match="mask"):
            other.forward_views(x, mask=torch.ones(2, 64, 64))


def test_the_views_are_of_the_size_that_the_network_was_made_for():
    net = model("vit_tiny_patch16_224", fg_mode="tokens", **VIT)
    views = make_views([torch.zeros(40, 60, 3, dtype=torch.uint8)], torch.tensor([[3.0, 3, 30, 30]]), net.view_spec)
    assert net.forward_views(**views.inputs()).fused.shape == (1, 4)


def test_parts_belong_to_ifam_models():
    with pytest.raises(L2R2Error, match="iFAM"):
        model(fg_mode="parts")

"""The contract of a timm model, for the smallest model of each family in the registry."""

import copy
import re

import pytest
import timm
import torch
from l2r2_hub_configs import MASKED, PARTS
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer

from l2r2_models import L2R2Error
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.models.hub_configs import load_hub_configs
from l2r2_models.models.registry import ARCHITECTURES

TINY_VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}
TINY_HIERA = {"embed_dim": 24, "stages": (1, 1, 2, 1)}
FAMILIES = {
    "l2r2_convnextv2_atto": {},
    "l2r2_convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)},
    "l2r2_resnet18": {},
    "l2r2_vit_tiny_patch16_224": {"img_size": 64, "depth": 4},
    "l2r2_vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 4},
    "l2r2_swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    "l2r2_efficientnet_b0": {},
    "l2r2_masked_vit_small_patch16_224": {"img_size": 64, "depth": 3},
    "l2r2_masked_eva02_small_patch14_336": {"img_size": 56, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "ifam_vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "ifam_eva02_small_patch14_336": {"img_size": 56, "depth": 3, "embed_dim": 48, "num_heads": 3},
    "l2r2_mobilenetv4_conv_small_050": {},
    "l2r2_vit_small_patch16_dinov3": {"img_size": 64, **TINY_VIT},
    "l2r2_vit_base_patch16_siglip_224": {"img_size": 64, **TINY_VIT},
    "l2r2_vit_pe_core_tiny_patch16_384": {"img_size": 64, **TINY_VIT},
    "l2r2_hiera_tiny_224": {"img_size": 64, **TINY_HIERA},
    "l2r2_naflexvit_base_patch16_gap": {"img_size": 64, **TINY_VIT, "depth": 4},
    "l2r2_masked_naflexvit_base_patch16_gap": {"img_size": 64, **TINY_VIT, "depth": 4},
    "l2r2_mobilenetv4_hybrid_medium": {},
    "l2r2_eva02_tiny_patch14_224": {"img_size": 56, **TINY_VIT},
    "l2r2_vit_pe_spatial_tiny_patch16_512": {"img_size": 64, **TINY_VIT},
    "l2r2_vit_base_patch14_reg1_tipsv2": {"img_size": 56, **TINY_VIT},
    "l2r2_hiera_small_abswin_256": {"img_size": 64, **TINY_HIERA},
}
SLOW = list(FAMILIES)[-5:]  # each of them shares timm's class with a family above; `-m slow` runs them


def each(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **FAMILIES[name], **options})


def images(name, batch=2, channels=3):
    size = FAMILIES[name].get("img_size", 64)
    return torch.randn(batch, channels, size, size)


@pytest.fixture(params=each(FAMILIES))
def name(request):
    return request.param


def finds_parts(name):
    return name.startswith("ifam_")


def family(name):
    """The name without sizes; one family each for masked models and for iFAM, whatever their ViT."""
    if name.startswith((MASKED, PARTS)):
        return name.partition("vit")[0]
    sizes = "atto|femto|pico|nano|tiny|small|base|medium|large|huge|plus|so400m|aa|b0|lite[0-9]|(?:patch|window)?[0-9]+"
    return re.sub(rf"_(?:{sizes})(?=_|$)|(?<=resnet)[0-9]+", "", name)


def test_the_registry_holds_every_architecture_and_every_family_is_tested():
    assert set(timm.list_models(["l2r2*", "ifam*"])) == {*ARCHITECTURES, "l2r2"}
    assert {family(a) for a in ARCHITECTURES} == {family(a) for a in FAMILIES}


def test_shapes_and_heads(name):
    model, x = build(name).eval(), images(name)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert model(x).shape == (2, 5)
    assert pooled.shape == (2, model.head_hidden_size)
    found = torch.tensor([True, False])
    out = model.forward_views(x, has_fg=found) if finds_parts(name) else model.forward_views(x, x, found)
    assert out.fused.shape == (2, 5)
    # the answer of an ifam model is that of its second pass, which no features of the first one give
    assert torch.allclose(model.forward_head(features), out.full if finds_parts(name) else model(x), atol=1e-5)


def test_gradients_reach_every_parameter(name):
    model = build(name).train()
    model(images(name)).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_classifier_can_be_replaced_or_removed(name):
    model, x = build(name).eval(), images(name)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    assert {h.out_features for h in model.get_classifier().values()} == {7}
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    assert build(name, num_classes=0).eval()(x).shape == (2, model.head_hidden_size)


def test_one_channel(name):
    model = build(name, in_chans=1).eval()
    assert model(images(name, channels=1)).shape == (2, 5)
    boxes = torch.tensor([[3.0, 3, 40, 30], [float("nan")] * 4])
    assert model(images(name, channels=1), boxes).shape == (2, 5)


def test_features_only_and_intermediates(name):
    x = images(name)
    features = build(name, features_only=True).eval()
    out = features(x)
    assert [o.shape[1] for o in out] == features.feature_info.channels()
    model = build(name).eval()
    last, intermediates = model.forward_intermediates(x, indices=2)
    assert torch.allclose(last, model.forward_features(x)) and len(intermediates) == 2


def test_parameter_groups_cover_every_parameter(name):
    from timm.models import group_parameters

    model = build(name)
    groups = group_parameters(model, model.group_matcher())
    assert sorted(p for g in groups.values() for p in g) == sorted(n for n, _ in model.named_parameters())
    assert len(groups) > 2
    stem = min(groups)
    assert all(n.startswith("backbone.") for n in groups[stem])
    undecayed = model.no_weight_decay()  # timm names parameters that may not exist, e.g. a dist_token
    assert undecayed == {f"backbone.{n}" for n in getattr(model.backbone, "no_weight_decay", set)()}


def test_gradient_checkpointing_changes_nothing(name):
    model, x = build(name).eval(), images(name)
    before = model(x)
    model.set_grad_checkpointing()
    assert torch.allclose(model(x), before, atol=1e-5)


def test_fx(name):
    model, x = build(name).eval(), images(name)
    tracer = NodePathTracer(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    tolerance = 1e-5 if finds_parts(name) else 0  # a graph masks keys where the model drops tokens
    assert torch.allclose(traced(x), model(x), rtol=0, atol=tolerance)


def test_jit(name):
    if "hiera" in name or "naflex" in name:
        pytest.skip("timm's Hiera and NaFlexViT cannot be scripted")
    with timm.layers.set_scriptable(True):
        model = build(name).eval()
    x = images(name)
    assert torch.allclose(torch.jit.script(model)(x), model(x), atol=1e-5)


def test_compile_full_graph_with_and_without_boxes(name):
    torch._dynamo.reset()
    model, x = build(name).eval(), images(name)
    boxes = torch.tensor([[3.0, 3, 40, 30], [float("nan")] * 4])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert torch.allclose(compiled(x, boxes), model(x, boxes), atol=1e-5)


def test_export_keeps_the_batch_dynamic(name):
    model, batch = build(name).eval(), torch.export.Dim("batch", min=1, max=64)
    x, boxes = images(name, 3), torch.tensor([[3.0, 3, 40, 30]]).repeat(3, 1)
    program = torch.export.export(model, (images(name), boxes[:2]), dynamic_shapes={"x": {0: batch}, "boxes": {0: batch}})
    assert torch.allclose(program.module()(x, boxes), model(x, boxes), atol=1e-5)


def test_state_dict_round_trip(name):
    model, other, x = build(name).eval(), build(name).eval(), images(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(x), model(x))


def test_weights_of_the_timm_model_give_the_timm_model_bit_for_bit(name, tmp_path):
    """What `pretrained=True` does, on weights made here instead of downloaded."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    options = FAMILIES[name]
    plain = timm.create_model(ARCHITECTURES[name], num_classes=1000, **options).eval()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=1000)
    derived = timm.create_model(name, pretrained=True, num_classes=1000, pretrained_cfg_overlay=overlay, **options).eval()
    x = images(name)
    with torch.inference_mode():
        if finds_parts(name):  # its second stage starts from the classifier, and sees what the plain one sees with all patches
            seen = derived.forward_views(x, mask=torch.ones(2, 64, 64)).fg
            assert torch.allclose(seen, plain(x), atol=1e-5)
        else:
            assert torch.equal(derived(x), plain(x))
            out = derived.forward_views(x, x)
            assert torch.equal(out.full, out.fg)  # both heads start from the same classifier
    fresh = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay=overlay, **options)
    assert fresh.eval()(images(name, channels=1)).shape == (2, 3)


HEADLESS = sorted({c.architecture for c in load_hub_configs() if c.labels is None} & set(FAMILIES))


@pytest.mark.parametrize("name", each(HEADLESS))
def test_headless_weights_load_into_the_backbone(name, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    options = FAMILIES[name]
    plain = timm.create_model(ARCHITECTURES[name], num_classes=0, **options).eval()
    weights = {k: v for k, v in plain.state_dict().items() if not k.startswith("head.norm")}
    save_file(weights, tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=0)
    derived = timm.create_model(name, pretrained=True, num_classes=6, pretrained_cfg_overlay=overlay, **options).eval()
    assert all(torch.equal(v, derived.state_dict()[f"backbone.{k}"]) for k, v in weights.items())
    assert derived(images(name)).shape == (2, 6)


def test_a_projection_into_the_space_of_texts_is_not_taken_for_a_classifier(tmp_path):
    """timm counts its 512 dimensions as classes."""
    from safetensors.torch import save_file

    name, options = "l2r2_vit_pe_core_tiny_patch16_384", FAMILIES["l2r2_vit_pe_core_tiny_patch16_384"]
    plain = timm.create_model(ARCHITECTURES[name], num_classes=512, **options)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    model = timm.create_model(name, pretrained=True, num_classes=512, pretrained_cfg_overlay=overlay, **options)
    assert torch.equal(model.backbone.attn_pool.latent, plain.attn_pool.latent)
    assert not torch.equal(model.heads["full"].weight, plain.head.weight)
    assert not torch.equal(model.heads["full"].weight, model.heads["fg"].weight)


def test_device_and_dtype_reach_every_module(name):
    half = build(name, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(images(name).bfloat16()).dtype == torch.bfloat16
    meta = build(name, device="meta")
    meta.reset_classifier(7)
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    assert not {"device", "dtype"} & set(half.arguments())


def test_new_heads_take_over_the_mode_and_forget_what_was_fitted(name):
    net = build(name).eval()
    net.fusion.threshold.fill_(0.93)
    net.reset_classifier(4)
    assert not any(module.training for module in net.modules())
    fresh = build(name, num_classes=4)
    assert net.fusion.config() == fresh.fusion.config()
    net.train()
    net.reset_classifier(4)
    assert net.heads["fg"].training and net.fusion.training
    half = build(name).to(torch.bfloat16)
    half.reset_classifier(4)
    assert {v.dtype for v in half.state_dict().values() if v.is_floating_point()} == {torch.bfloat16}


def test_plain_fx_and_torchvisions_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor

    net, x = build("l2r2_resnet18").eval(), images("l2r2_resnet18")
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    found = create_feature_extractor(net, ["backbone.layer3"])(x)
    assert found["backbone.layer3"].shape[1] == 256


@pytest.mark.parametrize("name", ["l2r2_vit_tiny_patch16_224", "l2r2_swin_tiny_patch4_window7_224", "ifam_vit_tiny_patch16_224"])
def test_another_input_size_reaches_backbone_and_views(name):
    net = build(name).eval()
    net.set_input_size(img_size=32)
    assert net.view_spec.size == 32 and net.arguments()["img_size"] == 32
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    again = timm.create_model(name, num_classes=5, **net.arguments()).eval()
    assert again(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(L2R2Error, match="Views are square"):
        net.set_input_size(img_size=(32, 64))
    assert not hasattr(build("l2r2_resnet18"), "set_input_size")


def test_another_patch_size_is_loaded_again(tmp_path):
    net = build("l2r2_vit_tiny_patch16_224").eval()
    net.set_input_size(img_size=(32, 32), patch_size=8)
    save_checkpoint(net, tmp_path, list("abcde"))
    again, x = load_checkpoint(tmp_path).model, torch.randn(1, 3, 32, 32)
    assert again.backbone.patch_embed.patch_size == (8, 8) and torch.equal(again(x), net(x))


def test_views_of_another_size_than_the_backbone_was_built_for_are_refused_when_it_is_built():
    with pytest.raises(L2R2Error, match=r"was built for 64 x 64 pixels, but the views have 96 x 96; pass img_size=96"):
        build("l2r2_vit_tiny_patch16_224", views={"size": 96})
    assert build("l2r2_vit_tiny_patch16_224", views={"size": 96}, dynamic_img_size=True).view_spec.size == 96
    with pytest.raises(L2R2Error, match=r"hiera_tiny_224 was built for 64 x 64 pixels, but the views have 96 x 96"):
        build("l2r2_hiera_tiny_224", views={"size": 96})


class Harmful:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


REACHING = ["checkpoint_path", "pretrained", "pretrained_cfg_overlay", "cache_dir", "features_only", "depht"]


@pytest.mark.parametrize("key", REACHING)
def test_a_config_reaches_nothing_but_the_shape_of_the_network(key, tmp_path):
    """`checkpoint_path` in the config of a downloaded model used to unpickle any file."""
    import json

    from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint

    torch.save(Harmful(tmp_path / "harmed"), tmp_path / "evil.pth")
    save_checkpoint(build("l2r2_resnet18"), tmp_path / "run", list("abcde"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model_args"][key] = str(tmp_path / "evil.pth")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(L2R2Error, match=f"{tmp_path / 'run'}: .*({key} is not allowed in a checkpoint|takes no {key})"):
        load_checkpoint(tmp_path / "run")
    if key == "checkpoint_path":  # without our own loader
        with pytest.raises(TypeError, match="takes no checkpoint_path"):
            timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert not (tmp_path / "harmed").exists()

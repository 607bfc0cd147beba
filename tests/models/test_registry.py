"""The pretrained tags, and the private function of timm that they depend on."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.models._registry import get_arch_pretrained_cfgs

import l2r2_models
from l2r2_models import L2R2Error
from l2r2_models.models.hub_configs import load_hub_configs
from l2r2_models.models.registry import ARCHITECTURES, _trained_cfg, default_cfgs, timm_cfgs

# the configs were made from timm 1.0.31; older versions know fewer tags and licenses
OLD_TIMM = tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 31)


def test_timms_private_listing_still_gives_cfgs_by_name_with_tag():
    cfgs = get_arch_pretrained_cfgs("resnet18")
    assert cfgs["resnet18.a1_in1k"].hf_hub_id == "timm/resnet18.a1_in1k"
    assert cfgs["resnet18.a1_in1k"].classifier == "fc"


def test_every_architecture_has_a_default_tag_with_full_hub_id_and_prefixed_names():
    for architecture, backbone in ARCHITECTURES.items():
        cfg = timm.models.get_pretrained_cfg(architecture)
        assert cfg.hf_hub_id == f"timm/{backbone}.{cfg.tag}"
        assert cfg.first_conv.startswith("backbone.")
        assert cfg.classifier == ("heads.full", "heads.fg")
        assert not cfg.url and not cfg.custom_load


LARGE = {c.architecture for c in load_hub_configs() if c.default and c.parameters > 100e6}


@pytest.mark.parametrize("architecture", [pytest.param(a, marks=pytest.mark.slow if a in LARGE else ()) for a in ARCHITECTURES])
def test_every_architecture_is_built_with_views_of_its_default_tags_size(architecture):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    assert model.view_spec.size == timm.models.get_pretrained_cfg(architecture).input_size[-1]


def test_hub_configs_agree_with_timms_registry():
    checked = 0
    for config in load_hub_configs():
        source = get_arch_pretrained_cfgs(ARCHITECTURES[config.architecture]).get(config.source)
        if source is None and OLD_TIMM:
            continue  # the zoo leaves out a tag that the installed timm does not know
        assert config.hub_id == source.hf_hub_id
        assert config.license == source.license or OLD_TIMM
        assert config.input_size == source.input_size[-1]
        cfg = default_cfgs[config.architecture].cfgs[config.tag]
        assert cfg.num_classes == (source.num_classes if config.labels else 0)
        assert config.labels or source.num_classes not in (1000, 11821, 21841, 21843)
        checked += 1
    assert checked > 100


@pytest.mark.skipif(OLD_TIMM, reason="an older timm knows fewer tags")
def test_every_tag_that_timm_serves_is_in_the_table():
    for architecture, backbone in ARCHITECTURES.items():
        listed = {c.source for c in load_hub_configs() if c.architecture == architecture}
        assert listed >= set(timm_cfgs(backbone)) and listed, architecture


def test_a_published_tag_is_shown_whole_images():
    """timm's transforms of `l2r2_x.tag` pad or stretch as the checkpoint's own full view, and cut nothing off."""
    config = replace(load_hub_configs()[0], label_names=["a", "b"], model_args={"views": {"square": False}})
    assert _trained_cfg(config)["crop_mode"] == "squash"
    assert _trained_cfg(replace(config, model_args={}))["crop_mode"] == "border"


def test_a_backbone_that_the_installed_timm_lacks(monkeypatch):
    monkeypatch.setattr("timm.models._registry._model_entrypoints", {})
    with pytest.raises(L2R2Error, match="does not have resnet18; upgrade timm to use l2r2_resnet18"):
        l2r2_models.models.registry.l2r2_resnet18()


def test_only_the_generic_model_takes_a_backbone():
    with pytest.raises(L2R2Error, match="The backbone of ifam_vit_tiny_patch16_224 is vit_tiny_patch16_224"):
        timm.create_model("ifam_vit_tiny_patch16_224", backbone="resnet18")


def test_the_default_tag_is_the_strongest_imagenet_1k_one_up_to_256_pixels():
    for architecture in ARCHITECTURES:
        configs = [c for c in load_hub_configs() if c.architecture == architecture]
        (default,) = [c for c in configs if c.default]
        assert timm.models.get_pretrained_cfg(architecture).tag == default.tag
        rivals = [c.top1 or 0 for c in configs if c.labels == "imagenet-1k" and c.input_size <= 256]
        assert not rivals or default.top1 == max(rivals)


def test_parameter_counts_in_the_configs():
    for name in ("l2r2_convnextv2_atto", "l2r2_resnet18", "l2r2_vit_tiny_patch16_224"):
        model = timm.create_model(name)
        (config,) = [c for c in load_hub_configs() if c.architecture == name and c.default]
        assert config.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "options", [{"branches": ("full", "fg", "bg")}, {"branches": "full"}, {"branches": ("fg", "bg"), "shared": False}]
)
@pytest.mark.parametrize("architecture", ["l2r2_resnet18", "l2r2"])
def test_every_branch_starts_from_the_weights_whatever_the_branches(tmp_path, architecture, options):
    from safetensors.torch import save_file

    plain = timm.create_model("resnet18").eval()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    model = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    x = torch.randn(1, 3, 64, 64)
    for branch, logits in model.forward_branches(**dict.fromkeys(model.branches, x)).items():
        assert torch.allclose(logits, plain(x), atol=1e-5), branch
    other = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1, **options)
    assert other.eval()(x[:, :1]).shape == (1, 4)


def test_the_generic_model_takes_any_backbone_and_its_weights(tmp_path):
    from safetensors.torch import save_file

    plain = timm.create_model("regnetx_002", num_classes=10).eval()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=10)
    model = timm.create_model("l2r2", backbone="regnetx_002", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), plain(x))
    assert model.pretrained_cfg["mean"] == plain.pretrained_cfg["mean"]

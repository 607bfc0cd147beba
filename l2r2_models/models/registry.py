"""The registered architectures and their pretrained tags; importing this module registers them with timm."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timm
from l2r2_hub_configs import MASKED, PARTS, HubConfig
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import get_arch_pretrained_cfgs  # private: pinned by tests/models/test_registry.py
from torch import Tensor

from ..errors import L2R2Error
from ..offline import cache_if_offline
from ..views import ViewSpec, check_branches
from .backbones import unknown_backbone
from .hub_configs import load_hub_configs
from .ifam import IFAM
from .l2r2 import L2R2
from .weights import forget, overlay

__all__: list[str] = []  # timm appends to it

FORMAT_VERSION = 1  # of a checkpoint's model_args

# architecture -> timm backbone; entrypoints, tags and hub_configs/derived.csv are generated from this table
ARCHITECTURES: dict[str, str] = {
    f"l2r2_{backbone}": backbone
    for backbone in (
        *(f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")),
        *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
        "resnet18",
        "resnet50",
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
        *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large")),
        "swin_tiny_patch4_window7_224",
        "efficientnet_b0",
        *(f"mobilenetv4_{kind}" for kind in ("conv_small_050", "conv_small", "conv_medium", "conv_large", "conv_aa_large")),
        *(f"mobilenetv4_hybrid_{size}" for size in ("medium", "large")),
        *(f"eva02_{size}_patch14_{side}" for size, side in (("tiny", 336), ("small", 336), ("base", 448), ("large", 448))),
        *(f"eva02_{size}_patch14_224" for size in ("tiny", "small", "base", "large")),
        *(f"vit_{size}_patch16_dinov3" for size in ("small", "small_plus", "base", "large", "huge_plus")),
        *(f"vit_base_patch16_siglip_{side}" for side in (224, 256, 384)),
        *(f"vit_large_patch16_siglip_{side}" for side in (256, 384)),
        *(f"vit_so400m_patch14_siglip_{side}" for side in (224, 378)),
        *(f"vit_pe_core_{size}" for size in ("tiny_patch16_384", "small_patch16_384", "base_patch16_224", "large_patch14_336")),
        *(f"vit_pe_spatial_{size}_patch16_512" for size in ("tiny", "small", "base")),
        "vit_pe_spatial_large_patch14_448",
        *(f"vit_{size}_patch14_reg1_tipsv2" for size in ("base", "large", "so400m")),
        *(f"hiera_{size}_224" for size in ("tiny", "small", "base", "base_plus", "large")),
        "hiera_small_abswin_256",
        "naflexvit_base_patch16_gap",
    )
}
ARCHITECTURES |= {f"l2r2_efficientnet_lite{n}": f"tf_efficientnet_lite{n}" for n in range(3)}
_VITS = [*(f"vit_{s}_patch16_224" for s in ("small", "base")), *(f"vit_{s}_patch14_reg4_dinov2" for s in ("small", "base"))]
ARCHITECTURES |= {f"{MASKED}{vit}": vit for vit in (*_VITS, "eva02_small_patch14_336", "naflexvit_base_patch16_gap")}
ARCHITECTURES |= {f"{PARTS}{vit}": vit for vit in ("vit_tiny_patch16_224", *_VITS[2:], "eva02_small_patch14_336")}


def model_class(architecture: str) -> type[L2R2]:
    """The class of a registered architecture.

    >>> model_class("l2r2_resnet18").__name__
    'L2R2'
    """
    return IFAM if architecture.startswith(PARTS) else L2R2


def timm_cfgs(backbone: str) -> dict[str, PretrainedCfg]:
    """The pretrained cfgs of a timm backbone whose weights are on the Hub, by name with tag."""
    return {name: cfg for name, cfg in get_arch_pretrained_cfgs(backbone).items() if cfg.hf_hub_id and "." in name}


def derive_cfg(source: PretrainedCfg, *, headless: bool = False) -> PretrainedCfg:
    """Derive the pretrained cfg of an L2R2 model that starts from a timm classifier's weights.

    Its parameter names are those of the default branches; `_create` extends them to others.

    Args:
        source: timm's cfg of the weights.
        headless: whether the heads start at random although the weights have a last layer, e.g. a projection into the space of
            CLIP's texts.
    """
    return dataclasses.replace(
        source,
        architecture=None,
        tag=None,
        url=None,  # the Hub's copy is safetensors, timm's other URLs may be pickles
        custom_load=False,
        num_classes=0 if headless else source.num_classes,
        first_conv=_first_convs(source, ("backbone.",)),  # type: ignore[arg-type]  # timm takes one name or several
        classifier=("heads.full", "heads.fg"),  # type: ignore[arg-type]
    )


def _first_convs(source: PretrainedCfg | None, prefixes: Sequence[str]) -> str | tuple[str, ...] | None:
    """The names of a model's input convolutions, which timm adapts to another number of channels."""
    if source is None or not source.first_conv:
        return None
    names = (source.first_conv,) if isinstance(source.first_conv, str) else source.first_conv
    found = tuple(prefix + name for prefix in prefixes for name in names)
    return found[0] if len(found) == 1 else found


def _default_cfgs() -> dict[str, dict[str, Any] | PretrainedCfg]:
    """Cfgs by `architecture.tag` for all hub configs whose source the installed timm has; `*` marks the default tag."""
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    known = {backbone: timm_cfgs(backbone) for backbone in ARCHITECTURES.values()}  # an older timm lacks some
    for config in load_hub_configs():
        if config.architecture not in ARCHITECTURES:
            raise L2R2Error(f"The hub config of {config.name} names an unknown architecture; add it to ARCHITECTURES.")
        if config.trained:
            cfgs[config.name] = _trained_cfg(config)
            continue
        source = known[ARCHITECTURES[config.architecture]].get(config.source)
        if source is not None:
            cfgs[config.name + ("*" if config.default else "")] = derive_cfg(source, headless=config.labels is None)
    return cfgs


def _trained_cfg(config: HubConfig) -> dict[str, Any]:
    """The pretrained cfg of an L2R2 checkpoint on the Hub."""
    arguments = config.model_args or {}
    views = ViewSpec.from_dict(arguments.get("views", {}))
    size = views.size_of(arguments.get("branches", ["full"])[0])  # of the branch that `model(x)` uses
    return dict(
        hf_hub_id=config.hub_id,
        license=config.license,
        num_classes=len(config.label_names or ()),
        label_names=config.label_names,
        input_size=(3, size, size),
        mean=views.mean,
        std=views.std,
        interpolation=views.interpolation,
        crop_pct=1.0,
        crop_mode=views.crop_mode,
    )


default_cfgs = generate_default_cfgs(_default_cfgs())


def load_filter(state_dict: dict[str, Tensor], model: L2R2) -> dict[str, Tensor]:
    """Convert a timm checkpoint to the parameters of `model`; one of an L2R2 model passes through, except for its fusion.

    The classifier is copied to every head, and the rest to every backbone, after timm's own filter for the backbone. Parameters
    that a headless checkpoint (`head.norm`) or any classifier (`model.fresh`) lacks keep their initial values.

    Args:
        state_dict: the checkpoint.
        model: the model to load.

    Returns:
        A complete state dict of `model`.
    """
    own = model.state_dict()
    if any(key.startswith("backbone.") for key in state_dict):
        # a fusion chosen at load time replaces the saved one and its parameters
        kept = {k: v for k, v in state_dict.items() if not k.startswith("fusion.") or (k in own and v.shape == own[k].shape)}
        return {**{k: v for k, v in own.items() if k.startswith("fusion.")}, **kept}

    source = backbone_weights(state_dict, model)
    classifier = classifier_name(model)
    fresh = (*model.fresh, "heads.") if model.prototype_dim else model.fresh
    out = {k: v for k, v in own.items() if k.startswith(fresh)}
    for prefix in model.backbone_prefixes():
        body = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix) and ".head.norm." in k}
        body.update((k, v) for k, v in source.items() if k not in (f"{classifier}.weight", f"{classifier}.bias"))
        out.update((prefix + k, v) for k, v in body.items())
    if model.num_classes:
        for name in ("weight", "bias"):
            if (value := source.get(f"{classifier}.{name}")) is not None:
                heads = [f"heads.{branch}." for branch in model.branches]
                out.update((head + name, value.clone()) for head in heads if not head.startswith(fresh))
    return out


def backbone_weights(state_dict: dict[str, Tensor], model: L2R2) -> dict[str, Tensor]:
    """Apply timm's own checkpoint filter for the model's backbone, so that names and shapes match it."""
    module = sys.modules[model_entrypoint(model.backbone_name.split(".")[0]).__module__]
    convert: Callable[..., dict[str, Tensor]] = getattr(module, "checkpoint_filter_fn", lambda sd, _: sd)
    return convert(state_dict, model.backbone)


def classifier_name(model: L2R2) -> str:
    """Name of the classifier in the timm backbone's checkpoints, e.g. `head.fc`.

    Raises:
        L2R2Error: when the backbone has no single classifier.
    """
    name = model.backbone.default_cfg.get("classifier")
    if not isinstance(name, str):
        raise L2R2Error(f"{model.backbone_name} has no single classifier to initialize the heads from; use another backbone.")
    return name


TRAINED = {config.name: dict(config.model_args or {}) for config in load_hub_configs() if config.trained}


def check_format(version: Any) -> None:
    """Check that a checkpoint's format can be read.

    Raises:
        L2R2Error: when the format is newer than this version's, or not a format.
    """
    if type(version) is not int or version < 1:  # True is an int
        raise L2R2Error(f"format_version must be a whole number from 1, got {version!r}.")
    if version > FORMAT_VERSION:
        raise L2R2Error(f"checkpoint format {version} is newer than {FORMAT_VERSION}; upgrade l2r2-models.")


def _create(
    architecture: str,
    pretrained: bool = False,
    *,
    backbone: str,
    source: str | None = None,
    format_version: int = FORMAT_VERSION,
    **kwargs: Any,
) -> L2R2:
    """Build a model; `source` is the timm model with tag whose weights `pretrained` loads, by default that of the cfg's tag."""
    check_format(format_version)
    if source is None and isinstance(tag := kwargs.get("pretrained_cfg"), (str, type(None))):
        cfg = get_pretrained_cfg(architecture)
        source = f"{backbone}.{tag or (cfg.tag if cfg else '')}"
    if isinstance(tag := kwargs.get("pretrained_cfg"), str):  # a trained checkpoint brings its branches, fusion and views
        kwargs = {**TRAINED.get(f"{architecture}.{tag}", {}), **kwargs}
    branches = check_branches(kwargs.get("branches") or ("full", "fg"))
    prefixes = ["backbone.", *(f"branch_backbones.{b}." for b in branches[1:] if not kwargs.get("shared", True))]
    names = dict(
        first_conv=_first_convs(get_pretrained_cfg(backbone.split(".")[0]), prefixes),
        classifier=tuple(f"heads.{branch}" for branch in branches),
    )
    installed = overlay(source) if pretrained and source else {}
    kwargs["pretrained_cfg_overlay"] = {**names, **installed, **(kwargs.get("pretrained_cfg_overlay") or {})}
    if architecture.startswith(MASKED) and kwargs.get("views") is None:
        kwargs.setdefault("fg_mode", "tokens")
    with cache_if_offline() if pretrained and not installed else contextlib.nullcontext():
        model = build_model_with_cfg(
            model_class(architecture),
            architecture,
            pretrained,
            pretrained_filter_fn=load_filter,
            feature_cfg=dict(feature_cls="getter", out_indices=_feature_indices(backbone)),
            backbone=backbone,
            **kwargs,
        )
    forget(model)
    return model


def _feature_indices(backbone: str) -> tuple[int, ...]:
    """Default levels of `features_only`: all stages of a hierarchical network, the last three blocks of a ViT, as in timm."""
    if backbone.startswith(("resnet", "efficientnet", "tf_efficientnet", "mobilenetv4")):
        return (0, 1, 2, 3, 4)
    return (-3, -2, -1) if backbone.startswith(("vit_", "eva02_")) else (0, 1, 2, 3)


def _entrypoint(architecture: str, backbone: str) -> Callable[..., L2R2]:
    def create(pretrained: bool = False, **kwargs: Any) -> L2R2:
        if "backbone" in kwargs:
            raise L2R2Error(f"The backbone of {architecture} is {backbone}; use the generic model l2r2 for another one.")
        if not is_model(backbone):
            raise L2R2Error(f"timm {timm.__version__} does not have {backbone}; upgrade timm to use {architecture}.")
        return _create(architecture, pretrained, backbone=backbone, **kwargs)

    create.__name__ = create.__qualname__ = architecture
    kind = model_class(architecture).__name__
    create.__doc__ = f"{kind} on timm's `{backbone}`; see `l2r2_models.{kind}` for the arguments."
    return register_model(create)


for _architecture, _backbone in ARCHITECTURES.items():
    globals()[_architecture] = _entrypoint(_architecture, _backbone)


@register_model
def l2r2(pretrained: bool = False, backbone: str = "resnet18", **kwargs: Any) -> L2R2:
    """L2R2 on any timm backbone: `timm.create_model("l2r2", backbone="convnext_nano.in12k_ft_in1k", pretrained=True)`.

    Args:
        pretrained: whether backbone and heads start from the weights of the backbone's tag, or of its default tag.
        backbone: a timm model, with or without a tag.
        **kwargs: other arguments of `L2R2`.

    Raises:
        L2R2Error: when the backbone is unknown, or a tag is given for `l2r2` itself.

    >>> timm.create_model("l2r2", backbone="resnet18", num_classes=5).branches
    ('full', 'fg')
    """
    if not is_model(backbone.split(".")[0]):
        raise L2R2Error(unknown_backbone(backbone))
    if isinstance(kwargs.get("pretrained_cfg"), str):
        raise L2R2Error(f'The generic model l2r2 has no tag "{kwargs["pretrained_cfg"]}"; pass one with backbone="name.tag".')
    source = None
    if kwargs.get("pretrained_cfg") is None:
        source = backbone
        kwargs["pretrained_cfg"] = derive_cfg(get_pretrained_cfg(backbone) or PretrainedCfg()).to_dict()
    return _create("l2r2", pretrained, backbone=backbone, source=source, **kwargs)


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """See `l2r2_models.list_models`."""
    return [name for name in timm.list_models(pattern, pretrained=pretrained) if name.split(".")[0] in (*ARCHITECTURES, "l2r2")]

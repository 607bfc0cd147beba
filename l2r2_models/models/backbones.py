"""Checks of timm backbones: their names, the arguments they take, and their view sizes and stages."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import L2R2Error

BATCH_NORM = {"bn_tf", "bn_momentum", "bn_eps"}  # timm's EfficientNets take these in addition to constructor parameters


class UnknownArgument(L2R2Error, TypeError):
    """A keyword argument that a network does not take; also a `TypeError`, as for any Python function."""


def unknown_backbone(name: str) -> str:
    """Return the error message for an unknown timm backbone, with close names.

    >>> unknown_backbone("resnet51").partition(";")[0]
    'Unknown timm backbone "resnet51"'
    """
    stem = name.split(".")[0]
    close = get_close_matches(stem, timm.list_models(), 5)
    return f'Unknown timm backbone "{stem}"' + (f"; close names: {', '.join(close)}." if close else ".")


def check_backbone_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that do not describe the network; in a downloaded config, one could name a pickle to load.

    Args:
        name: a timm model.
        arguments: its keyword arguments; only those of the network constructors in its timm module are allowed, and the fields of
            the configs that these take (NaFlexViT).

    Raises:
        UnknownArgument: when an argument is not allowed.

    >>> check_backbone_arguments("resnet18", {"drop_path_rate": 0.1})
    """
    module = sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]
    networks = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    classes = {base for c in networks for base in inspect.getmro(c)}  # a subclass may forward **kwargs
    makers = [vars(c)["__init__"] for c in classes if "__init__" in vars(c) and c is not object]
    parameters = [inspect.signature(maker).parameters for maker in makers]
    configs = [c for c in vars(module).values() if isinstance(c, type) and is_dataclass(c)]
    allowed = {name for found in parameters if "num_classes" in found for name in found} | BATCH_NORM
    allowed |= {field.name for c in configs if "cfg" in allowed for field in fields(c)}
    if wrong := sorted(set(arguments) - (allowed - {"self", "kwargs", "device", "dtype"})):
        close = get_close_matches(wrong[0], allowed, 3)
        hint = f"; close matches: {', '.join(close)}." if close else "."
        raise UnknownArgument(f"The backbone {name} takes no {wrong[0]}{hint}")


def check_view_sizes(backbone: Any, name: str, sizes: Sequence[int]) -> None:
    """Check that a backbone takes square views of these sizes.

    Args:
        backbone: the timm model.
        name: its name, for messages.
        sizes: the side of each branch's view in pixels.

    Raises:
        L2R2Error: when it was built for another size and takes no other.
    """
    embed: Any = getattr(backbone, "patch_embed", None)
    built = embed.img_size if getattr(embed, "strict_img_size", False) else None
    if hasattr(backbone, "tokens_spatial_shape"):  # Hiera
        built = [tokens * stride for tokens, stride in zip(backbone.tokens_spatial_shape, backbone.patch_stride)]
        unit = backbone.patch_stride[0] * backbone.mask_unit_size[0]
        if wrong := [size for size in sizes if size % unit]:
            raise L2R2Error(f"{name} takes views whose side is a multiple of {unit} pixels, not {wrong[0]}.")
    if built is not None and set(sizes) != set(built):
        sides = " x ".join(map(str, built))
        if len(set(sizes)) > 1:
            raise L2R2Error(f"{name} takes views of {sides} pixels only; leave sizes out, or use another backbone.")
        size = sizes[0]
        raise L2R2Error(f"{name} was built for {sides} pixels, but the views have {size} x {size}; pass img_size={size}.")


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether a backbone has more convolutions than a patch embedding; the channels-last memory layout suits these."""
    return sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1


def feature_info(backbone: Any) -> list[dict[str, Any]]:
    """Module, channels and reduction of each stage, in either form that timm stores them."""
    info = backbone.feature_info
    return list(info.info if hasattr(info, "info") else info)


def early_stages(backbone: Any, stride: int) -> list[nn.Module]:
    """Return the modules up to the last stage whose output stride is at most `stride`, in the order of their definition.

    The stages with the largest stride of the network are never among them; a ViT, which has one stride, has no early stages.

    >>> import timm
    >>> [type(module).__name__ for module in early_stages(timm.create_model("resnet10t"), 4)]
    ['Sequential', 'BatchNorm2d', 'ReLU', 'MaxPool2d', 'Sequential']
    """
    stages = feature_info(backbone)
    last = max((stage["reduction"] for stage in stages), default=0)
    names = [stage["module"] for stage in stages if stage["reduction"] <= stride and stage["reduction"] < last]
    return _until(backbone, names[-1]) if names else []


def _until(parent: nn.Module, name: str) -> list[nn.Module]:
    """Return the children up to a submodule, and of the child that contains it, those up to it."""
    first, _, rest = name.partition(".")
    found: list[nn.Module] = []
    for child, module in parent.named_children():
        if child == first:
            return found + (_until(module, rest) if rest else [module])
        found.append(module)
    return found


def feature_map(backbone: Any, features: Tensor, view: Tensor) -> Tensor:
    """Convert the output of a timm backbone's `forward_features` to a map `[B, C, h, w]`, without prefix tokens."""
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else features
    patches = features[:, getattr(backbone, "num_prefix_tokens", 0) :]
    rows = round(math.sqrt(patches.shape[1] * view.shape[2] / view.shape[3]))
    grid: Tensor = patches.transpose(1, 2).unflatten(2, (rows, -1))
    return grid


@contextmanager
def last_map_through(backbone: Any, probe: nn.Module, view: Tensor) -> Iterator[None]:
    """Route the feature map `[B, C, h, w]` for class activation maps through `probe` inside the `with` block.

    For a ViT that pools by its class token, this is the input of the last attention, after which patches no longer affect the
    output. For any other network, it is the input of `forward_head`.

    Args:
        backbone: any timm model.
        probe: a module from map to map, e.g. an `nn.Identity` with hooks; not called if the features are not a map.
        view: `[B, C, H, W]`, the input, whose aspect ratio gives the shape of the map of a token network.
    """

    def routed(features: Tensor) -> Tensor:
        if features.ndim == 4:
            out: Tensor = probe(feature_map(backbone, features, view))
            return out.permute(0, 2, 3, 1) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else out
        if features.ndim != 3:
            return features
        patches = probe(feature_map(backbone, features, view)).flatten(2).transpose(1, 2)
        return torch.cat([features[:, : getattr(backbone, "num_prefix_tokens", 0)], patches], 1)

    if getattr(backbone, "global_pool", "") == "token" and hasattr(backbone, "blocks"):
        handle = backbone.blocks[-1].norm1.register_forward_hook(lambda module, inputs, out: routed(out))
        try:
            yield
        finally:
            handle.remove()
        return
    original = backbone.forward_head
    backbone.forward_head = lambda features, *args, **options: original(routed(features), *args, **options)
    try:
        yield
    finally:
        del backbone.forward_head


def attention_layers(backbone: Any) -> list[Any]:
    """Return the attention layers of a plain ViT whose weights `attention_of` can collect, in order; none for other networks."""
    layers = [getattr(block, "attn", None) for block in getattr(backbone, "blocks", ())]
    return layers if all(hasattr(a, "fused_attn") and hasattr(a, "attn_drop") for a in layers) else []


@contextmanager
def attention_of(layers: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Collect the attention `[B, heads, N, N]` of every layer in order; fused attention is disabled meanwhile."""
    seen: list[Tensor] = []
    before = [layer.fused_attn for layer in layers]
    handles = [layer.attn_drop.register_forward_hook(lambda module, inputs, out: seen.append(out)) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        yield seen
    finally:
        for layer, fused, handle in zip(layers, before, handles):
            layer.fused_attn = fused
            handle.remove()

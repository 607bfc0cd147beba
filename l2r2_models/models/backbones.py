"""Checks of timm backbones: their names, the arguments they take, and their view sizes and stages."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from ..errors import L2R2Error

BATCH_NORM = {"bn_tf", "bn_momentum", "bn_eps"}  # timm's EfficientNets take these in addition to constructor parameters


class UnknownArgument(L2R2Error, TypeError):
    """A keyword argument that a network does not take; also a `TypeError`, as for any Python function."""


def unknown_backbone(name: str) -> str:
    """The error message for a timm backbone that does not exist, with close names.

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
        arguments: its keyword arguments; only those of the network constructors in its timm module are allowed.

    Raises:
        UnknownArgument: when an argument is not allowed.

    >>> check_backbone_arguments("resnet18", {"drop_path_rate": 0.1})
    """
    module = sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]
    networks = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    classes = {base for c in networks for base in inspect.getmro(c)}  # a subclass may forward **kwargs
    makers = [vars(c)["__init__"] for c in classes if "__init__" in vars(c) and c is not object]
    parameters = [inspect.signature(maker).parameters for maker in makers]
    allowed = {name for found in parameters if "num_classes" in found for name in found} | BATCH_NORM
    if wrong := sorted(set(arguments) - (allowed - {"self", "kwargs", "device", "dtype"})):
        close = get_close_matches(wrong[0], allowed, 3)
        hint = f"; close matches: {', '.join(close)}." if close else "."
        raise UnknownArgument(f"The backbone {name} takes no {wrong[0]}{hint}")


def check_view_size(backbone: Any, name: str, size: int) -> None:
    """Check that a backbone takes square views of this size.

    Args:
        backbone: the timm model.
        name: its name, for messages.
        size: the side of the views in pixels.

    Raises:
        L2R2Error: when it was built for another size and takes no other.
    """
    embed = getattr(backbone, "patch_embed", None)
    built = getattr(embed, "img_size", None)
    if built is not None and getattr(embed, "strict_img_size", False) and tuple(built) != (size, size):
        sides = " x ".join(map(str, built))
        raise L2R2Error(f"{name} was built for {sides} pixels, but the views have {size} x {size}; pass img_size={size}.")


def feature_info(backbone: Any) -> list[dict[str, Any]]:
    """Module, channels and reduction of each stage, in either form that timm stores them."""
    info = backbone.feature_info
    return list(info.info if hasattr(info, "info") else info)

"""What timm's backbones are called, and what they tell about themselves."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from ..errors import L2R2Error

BATCH_NORM = {"bn_tf", "bn_momentum", "bn_eps"}  # which timm's EfficientNets take beside their constructors' parameters


class UnknownArgument(L2R2Error, TypeError):
    """A keyword argument that a network does not take; a TypeError too, as of any Python function."""


def unknown_backbone(name: str) -> str:
    """The sentence for a timm backbone that does not exist, with close names."""
    stem = name.split(".")[0]
    close = get_close_matches(stem, timm.list_models(), 5)
    return f'Unknown timm backbone "{stem}"' + (f"; close names: {', '.join(close)}." if close else ".")


def check_backbone_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that do not describe the network: one in a downloaded config may name a pickle to load.

    Args:
        name: of a timm model.
        arguments: for it. Allowed is what the constructors of the networks in its timm module take.

    Raises:
        UnknownArgument: one that is not allowed; the message names it.
    """
    module = sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]
    networks = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    classes = {base for c in networks for base in inspect.getmro(c)}  # a subclass may pass **kwargs on
    makers = [vars(c)["__init__"] for c in classes if "__init__" in vars(c) and c is not object]
    parameters = [inspect.signature(maker).parameters for maker in makers]
    allowed = {name for found in parameters if "num_classes" in found for name in found} | BATCH_NORM
    if wrong := sorted(set(arguments) - (allowed - {"self", "kwargs", "device", "dtype"})):
        close = get_close_matches(wrong[0], allowed, 3)
        hint = f"; close matches: {', '.join(close)}." if close else "."
        raise UnknownArgument(f"The backbone {name} takes no {wrong[0]}{hint}")


def check_view_size(backbone: Any, name: str, size: int) -> None:
    """Whether a backbone takes square views of so many pixels.

    Raises:
        L2R2Error: it was built for another size and takes no other.
    """
    embed = getattr(backbone, "patch_embed", None)
    built = getattr(embed, "img_size", None)
    if built is not None and getattr(embed, "strict_img_size", False) and tuple(built) != (size, size):
        sides = " x ".join(map(str, built))
        raise L2R2Error(f"{name} was built for {sides} pixels, the views have {size} x {size}; give img_size={size}.")


def feature_info(backbone: Any) -> list[dict[str, Any]]:
    """Module, channels and reduction of each stage, whichever way the backbone keeps them."""
    info = backbone.feature_info
    return list(info.info if hasattr(info, "info") else info)

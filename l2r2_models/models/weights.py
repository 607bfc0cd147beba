"""Load the pretrained weights that are installed as packages, see `l2r2_hub_configs.packaged`."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import timm
import torch
from l2r2_hub_configs.packaged import packaged
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from ..errors import L2R2Error
from ..io import file_sha256
from ..offline import cache_if_offline


def load_packaged(source: str) -> dict[str, Tensor] | None:
    """Load the installed tensors of a timm model under timm's names; None if no installed package has them.

    Args:
        source: a timm model with its tag, e.g. `tf_efficientnet_lite0.in1k`; without a tag, the default one.

    Raises:
        L2R2Error: when the file is missing, does not match its SHA-256, or does not match the timm model.
    """
    found = packaged(_with_tag(source))
    if found is None:
        return None
    if not found.file.is_file() or file_sha256(found.file) != found.sha256:
        raise L2R2Error(f"{found.file}: is missing or damaged; install {found.package} again.")
    try:
        is_pickle = found.file.suffix != ".safetensors"
        tensors = torch.load(found.file, map_location="cpu", weights_only=True) if is_pickle else load_file(found.file)
    except UnpicklingError:
        raise L2R2Error(f"{found.file}: contains more than tensors and is not loaded; report it to {found.package}.") from None
    wanted = timm.create_model(_with_tag(source), device="meta").state_dict()
    named = dict(zip(wanted, tensors.values())) if found.in_order else tensors
    if len(tensors) != len(wanted) or any(k not in named or named[k].shape != v.shape for k, v in wanted.items()):
        raise L2R2Error(f"{found.file}: does not contain the tensors of {source}; install another version of {found.package}.")
    return named


def overlay(source: str) -> dict[str, Any]:
    """The changes to a timm pretrained cfg that make timm load installed weights; empty if there are none.

    Args:
        source: see `load_packaged`.
    """
    tensors = load_packaged(source)
    return {} if tensors is None else {"state_dict": tensors}


def create_pretrained(name: str, **kwargs: Any) -> Any:
    """Run `timm.create_model(name, pretrained=True, ...)`, with the weights of an installed package if there is one.

    Raises:
        L2R2Error: see `load_packaged`.
    """
    with cache_if_offline():
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay(name), **kwargs)
    forget(model)
    return model


def forget(model: Any) -> None:
    """Remove the tensors of `overlay` from a model's pretrained cfgs, which would otherwise be copied and saved."""
    for module in model.modules():
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)


def _with_tag(source: str) -> str:
    if "." in source:
        return source
    cfg = get_pretrained_cfg(source)
    return f"{source}.{cfg.tag}" if cfg is not None and cfg.tag else source

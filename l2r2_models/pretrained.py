"""Load networks of transformers from a Hub id or a folder, with safetensors weights only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import L2R2Error
from .io import file_sha256
from .offline import cache_if_offline

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Pretrained:
    """A network in eval mode, its processor, and a digest of its weights (the Hub's commit, or the SHA-256 of the files)."""

    model: Any
    processor: Any
    digest: str | None


def load_pretrained(
    source: str,
    classes: tuple[str, str],
    model_types: Sequence[str],
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    *,
    extra: str = "detect",
    gated: bool = False,
) -> Pretrained:
    """Load a network and its processor.

    Args:
        source: Hub id or folder.
        classes: names of the transformers classes of the model and its processor.
        model_types: accepted values of `model_type` in its config.
        dtype: one of `DTYPES`.
        device: device of the network.
        extra: the extra of this package to install if transformers is missing.
        gated: whether the Hub gives the published weights only to those who accepted their license, for the message.

    Raises:
        L2R2Error: when transformers is missing, or the network cannot be loaded, is of another type, or has no safetensors.
    """
    try:
        import transformers
    except ImportError as error:
        raise L2R2Error(f'{source}: needs more packages: pip install "l2r2-models[{extra}]".') from error
    try:
        with nullcontext() if Path(source).is_dir() else cache_if_offline():
            config = transformers.AutoConfig.from_pretrained(source)
            if config.model_type not in model_types:
                raise L2R2Error(f"{source}: is a model of type {config.model_type}; use one of type {' or '.join(model_types)}.")
            of_model, of_processor = (getattr(transformers, name) for name in classes)
            processor = of_processor.from_pretrained(source)
            model = of_model.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True)
    except L2R2Error:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise L2R2Error(_sentence(source, error, gated)) from error
    return Pretrained(model.to(device).eval(), processor, _digest(source, config))


def _sentence(source: str, error: Exception, gated: bool) -> str:
    what = " ".join(str(error).split())[:200]
    if Path(source).is_dir():
        return f"{source}: cannot be loaded as a transformers model with safetensors weights ({what})."
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        return f"{source}: no such folder, and not a Hub id of the form org/name."
    how = f"on a machine with network access, run `hf download {source}`, then give the folder"
    from huggingface_hub.errors import GatedRepoError

    if gated or isinstance(error.__cause__, GatedRepoError):
        license = f"accept the license at https://huggingface.co/{source} and log in with `hf auth login`"
        return f"{source}: cannot be downloaded; its weights are gated: {license}; or {how} ({what})."
    return f"{source}: cannot be downloaded; {how} ({what})."


def _digest(source: str, config: Any) -> str | None:
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    if not files:
        return getattr(config, "_commit_hash", None)
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()

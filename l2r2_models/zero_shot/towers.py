"""Image and text towers of vision-language models: CLIP, SigLIP and SigLIP2 of transformers, and any model of open_clip."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import L2R2Error
from ..io import file_sha256, read_json
from ..pretrained import load_pretrained
from ..views import ViewSpec

TYPES = ("clip", "siglip", "siglip2")  # model types of transformers
CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
BILINEAR = 2  # Pillow's number, which image processors store


@dataclass(frozen=True)
class VisionLanguageModel:
    """A loaded model.

    Attributes:
        image: network from normalized views `[B, 3, S, S]` to image embeddings `[B, D]`.
        encode: function from N texts to text embeddings `[N, D]`.
        scale: factor of the cosine similarity in the logits (the exponential of the trained parameter).
        bias: term added to the logits; 0 for models trained with a softmax, unlike SigLIP with its sigmoid per class.
        views: how its images are cut.
        digest: SHA-256 of its weights and of the files of its tokenizer.
    """

    image: nn.Module
    encode: Callable[[Sequence[str]], Tensor]
    scale: float
    bias: float
    views: ViewSpec
    digest: str


def library_of(folder: Path) -> str:
    """Return which library can load a folder, `transformers` or `open_clip`.

    Raises:
        L2R2Error: when neither can.
    """
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if isinstance(config, dict) and config.get("model_type") in TYPES:
        return "transformers"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    raise L2R2Error(
        f"{folder}: is not a vision-language model; it needs a {CONFIG} with the model_type {', '.join(TYPES)}, "
        f"or an {OPEN_CLIP_CONFIG}."
    )


def load_towers(folder: Path) -> VisionLanguageModel:
    """Load a model from a folder, with safetensors weights only.

    Args:
        folder: a model saved by transformers with its processor, or by open_clip.

    Raises:
        L2R2Error: when a package is missing, or the model cannot be loaded.
    """
    return _of_transformers(folder) if library_of(folder) == "transformers" else _of_open_clip(folder)


class _TransformersImages(nn.Module):
    """The image tower of a model of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        self.projection = getattr(model, "visual_projection", nn.Identity())  # only CLIP has one

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.projection(self.vision_model(pixel_values=x).pooler_output)
        return pooled


class _PatchedImages(nn.Module):
    """The image tower of a NaFlex SigLIP2, which takes patches instead of pixels."""

    def __init__(self, model: Any, patch: int) -> None:
        super().__init__()
        self.vision_model, self.patch = model.vision_model, patch

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        grid = x.unflatten(2, (rows, self.patch)).unflatten(4, (columns, self.patch))  # [B, C, rows, p, columns, p]
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, rows * columns, p * p * C]
        seen = torch.ones(patches.shape[:2], dtype=torch.int32, device=x.device)
        shapes = torch.tensor([[rows, columns]], device=x.device).expand(len(x), 2)
        pooled: Tensor = self.vision_model(pixel_values=patches, pixel_attention_mask=seen, spatial_shapes=shapes).pooler_output
        return pooled


def _of_transformers(folder: Path) -> VisionLanguageModel:
    loaded = load_pretrained(str(folder), ("AutoModel", "AutoProcessor"), TYPES, extra="vlm")
    model, processor = loaded.model, loaded.processor
    kind, longest = model.config.model_type, model.config.text_config.max_position_embeddings
    padding: dict[str, Any] = {"padding": True} if kind == "clip" else {"padding": "max_length"}

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        tokens = processor.tokenizer(list(texts), return_tensors="pt", truncation=True, max_length=longest, **padding)
        embeddings: Tensor = model.get_text_features(**tokens).pooler_output
        return embeddings.float()

    images = processor.image_processor
    cfg = {
        "mean": tuple(images.image_mean),
        "std": tuple(images.image_std),
        "interpolation": "bilinear" if images.resample == BILINEAR else "bicubic",
    }
    if kind == "siglip2":
        side = math.isqrt(images.max_num_patches) * images.patch_size
        tower: nn.Module = _PatchedImages(model, images.patch_size)
    else:
        side, tower = model.config.vision_config.image_size, _TransformersImages(model)
    bias = model.logit_bias.item() if kind != "clip" else 0.0
    views = ViewSpec.from_pretrained_cfg({**cfg, "input_size": (3, side, side)})
    scale = model.logit_scale.exp().item()
    return VisionLanguageModel(tower.eval(), encode, scale, bias, views, _digest(folder))


class _OpenClipImages(nn.Module):
    """The image tower of a model of open_clip."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.visual(x)
        return pooled


def _of_open_clip(folder: Path) -> VisionLanguageModel:
    try:
        import open_clip
    except ImportError as error:
        raise L2R2Error(f'{folder}: needs more packages: pip install "l2r2-models[vlm]".') from error
    if not (folder / OPEN_CLIP_WEIGHTS).is_file():  # without it, open_clip would look for a pickle
        raise L2R2Error(f"{folder}: has no {OPEN_CLIP_WEIGHTS}; pickled weights are never loaded.")
    try:
        source = f"local-dir:{folder}"
        model: Any = open_clip.create_model(source).eval()
        tokenizer = open_clip.get_tokenizer(source)
        about = open_clip.get_model_preprocess_cfg(model)
    except Exception as error:  # open_clip, torch and safetensors each raise their own for a damaged file
        raise L2R2Error(f"{folder}: cannot be loaded as a model of open_clip ({' '.join(str(error).split())[:200]}).") from error

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        embeddings: Tensor = model.encode_text(tokenizer(list(texts)))
        return embeddings.float()

    side = about["size"] if isinstance(about["size"], int) else about["size"][0]
    cfg = {name: about[name] for name in ("mean", "std", "interpolation")}
    views = ViewSpec.from_pretrained_cfg({**cfg, "input_size": (3, side, side)})
    bias = getattr(model, "logit_bias", None)
    scale, images = model.logit_scale.exp().item(), _OpenClipImages(model).eval()
    return VisionLanguageModel(images, encode, scale, 0.0 if bias is None else bias.item(), views, _digest(folder))


def _digest(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt", ".model") and p.is_file())
    return hashlib.sha256(json.dumps([[p.name, file_sha256(p)] for p in files]).encode()).hexdigest()

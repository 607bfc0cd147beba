"""Image towers of vision-language models as timm networks, which can be trained further and saved in timm's layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import L2R2Error
from ..models.backbones import check_backbone_arguments
from .towers import VisionLanguageModel

CLIP, SIGLIP = "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"  # timm's; the arguments give the sizes
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers -> timm
CLOSE = 1e-4  # greatest difference of embeddings of length 1 that count as equal

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class TimmTower:
    """An image tower as a timm network, and the projection of its features into the space of the texts.

    Attributes:
        name: timm model.
        arguments: its keyword arguments.
        weights: its state dict, without a classifier.
        projection: `[E, D]`.
    """

    name: str
    arguments: dict[str, Any]
    weights: Weights
    projection: Tensor


def timm_tower(model: VisionLanguageModel, source: str) -> TimmTower:
    """Convert the image tower of a vision-language model, and check that it computes the same embeddings.

    Args:
        model: the model.
        source: its name, for messages.

    Returns:
        The tower; the model itself stays as it is.

    Raises:
        L2R2Error: when timm has no such network.
    """
    try:
        tower = _convert(model.image)
        check_backbone_arguments(tower.name, tower.arguments)  # a checkpoint with others could not be loaded
        network = timm.create_model(tower.name, num_classes=0, **tower.arguments).eval()
        network.load_state_dict(tower.weights)
        side = model.views.size
        views = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.inference_mode():
            ours, theirs = network(views) @ tower.projection.t(), model.image(views)
            equal = torch.allclose(normalize(ours, dim=-1), normalize(theirs, dim=-1), rtol=0, atol=CLOSE)
    except (L2R2Error, AttributeError, KeyError, RuntimeError, TypeError, ValueError, AssertionError):
        equal = False
    if not equal:
        raise L2R2Error(
            f"{source}: its image tower is not a network of timm, so it can classify but not be trained; use a CLIP, SigLIP or "
            "SigLIP2 with a ViT, or a model of open_clip with a timm_model_name."
        )
    return tower


def _convert(images: Any) -> TimmTower:
    if hasattr(images, "vision_model"):  # of transformers
        vision, kind = images.vision_model, images.vision_model.config.model_type
        return _of_clip(vision, images.projection) if kind.startswith("clip") else _of_siglip(vision)
    visual = images.visual  # of open_clip
    return _of_trunk(visual) if hasattr(visual, "trunk") else _of_open_clip(visual)


def _of_clip(vision: Any, projection: nn.Linear) -> TimmTower:
    state, config = vision.state_dict(), vision.config
    weights = _blocks(state)
    weights["cls_token"] = state["embeddings.class_embedding"][None, None]
    weights["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    weights["patch_embed.proj.weight"] = state["embeddings.patch_embedding.weight"]
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        weights.update(_moved(state, theirs, ours))
    return TimmTower(CLIP, _sizes(config, config.image_size), weights, projection.weight.detach())


def _of_siglip(vision: Any) -> TimmTower:
    state, config = vision.state_dict(), vision.config
    weights = _blocks(state)
    weights["pos_embed"] = state["embeddings.position_embedding.weight"][None]
    weights.update(_moved(state, "embeddings.patch_embedding", "patch_embed.proj"))
    patch = weights["patch_embed.proj.weight"]
    side = config.image_size if patch.ndim == 4 else round(config.num_patches**0.5) * config.patch_size
    if patch.ndim == 2:  # SigLIP2 takes flattened patches, row by row, channels last
        grid = patch.unflatten(1, (config.patch_size, config.patch_size, 3))
        weights["patch_embed.proj.weight"] = grid.permute(0, 3, 1, 2).contiguous()
    weights.update(_moved(state, "post_layernorm", "norm"))
    weights["attn_pool.latent"] = state["head.probe"]
    for name in ("weight", "bias"):
        query, key_and_value = state[f"head.attention.in_proj_{name}"].tensor_split([config.hidden_size])
        weights[f"attn_pool.q.{name}"], weights[f"attn_pool.kv.{name}"] = query, key_and_value
    weights.update(_moved(state, "head.attention.out_proj", "attn_pool.proj"))
    weights.update(_moved(state, "head.layernorm", "attn_pool.norm"))
    weights.update(_moved(state, "head.mlp", "attn_pool.mlp"))
    return TimmTower(SIGLIP, _sizes(config, side), weights, torch.eye(config.hidden_size))


def _blocks(state: Weights) -> Weights:
    """The transformer blocks of a tower of transformers under timm's names."""
    swaps = (("layer_norm", "norm"), ("self_attn.out_proj", "attn.proj"))
    found: Weights = {}
    for name, value in _moved(state, "encoder.layers", "blocks").items():
        for theirs, ours in swaps:
            name = name.replace(theirs, ours)
        found[name] = value
    for name in [name for name in found if ".self_attn.q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return found


def _sizes(config: Any, side: int) -> dict[str, Any]:
    """The arguments of a timm ViT for a config of transformers."""
    return {
        "img_size": side,
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "act_layer": ACTIVATIONS[config.hidden_act],
    }


def _of_open_clip(visual: Any) -> TimmTower:
    """The ViT of open_clip, whose checkpoints timm can convert itself."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    block, (width, _, patch, _) = visual.transformer.resblocks[0], visual.conv1.weight.shape
    arguments = {
        "img_size": visual.image_size[0],
        "patch_size": patch,
        "embed_dim": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / width,
        "act_layer": "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
    }
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    network: Any = timm.create_model(CLIP, num_classes=0, **arguments)
    weights: Weights = checkpoint_filter_fn(state, network)
    projection = weights.pop("head.weight")
    del weights["head.bias"]
    return TimmTower(CLIP, arguments, weights, projection)


def _of_trunk(visual: Any) -> TimmTower:
    """A timm network inside open_clip, with at most a linear projection without bias behind it."""
    name, side = visual.trunk.pretrained_cfg["architecture"], visual.image_size[0]
    weights, features = visual.trunk.state_dict(), visual.trunk.num_features
    projection = torch.eye(features)
    for key, value in visual.head.state_dict().items():
        if key != "proj.weight":
            raise KeyError(key)
        projection = value
    sized = visual.trunk.pretrained_cfg.get("fixed_input_size") and side != visual.trunk.pretrained_cfg["input_size"][-1]
    return TimmTower(name, {"img_size": side} if sized else {}, weights, projection)


def _moved(state: Weights, theirs: str, ours: str) -> Weights:
    """The entries of a module under another name."""
    return {ours + name.removeprefix(theirs): value for name, value in state.items() if name.startswith(f"{theirs}.")}

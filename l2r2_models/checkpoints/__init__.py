"""Checkpoints in timm's layout: `model.safetensors` + `config.json`, saved, loaded, downloaded, converted and exported."""

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

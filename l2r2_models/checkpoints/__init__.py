"""Checkpoints in timm's layout (`model.safetensors` and `config.json`): saving, loading, download, conversion and export."""

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

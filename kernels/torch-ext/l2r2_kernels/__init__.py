"""Fused image-view and masked-attention ops: a PyTorch reference beside every Triton kernel."""

from .roi_views import roi_views

__all__ = ["roi_views"]

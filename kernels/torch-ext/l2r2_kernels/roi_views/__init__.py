"""Decoded images and boxes to network input: a PyTorch reference, Triton kernels and a CPU path."""

from .op import roi_views
from .source import RaggedImages

__all__ = ["RaggedImages", "roi_views"]

"""Fused image-view and masked-attention ops, with a PyTorch reference for every Triton kernel."""

from .masked_attention import (
    GraphMemory,
    MaskedRunner,
    Packed,
    PackedRunner,
    masked_attention,
    pack,
    round_capacity,
    run_masked,
    run_packed,
    unpack,
    varlen_attention,
)
from .roi_views import RaggedImages, roi_views

__all__ = [
    "GraphMemory",
    "MaskedRunner",
    "Packed",
    "PackedRunner",
    "RaggedImages",
    "masked_attention",
    "pack",
    "roi_views",
    "round_capacity",
    "run_masked",
    "run_packed",
    "unpack",
    "varlen_attention",
]

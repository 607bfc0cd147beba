"""Attention over the kept tokens of an image: packed (variable length), or masked with every token in place."""

from .attention import masked_attention, varlen_attention
from .blocks import run_masked, run_packed
from .graph import MaskedRunner, PackedRunner
from .op import key_index
from .packing import Packed, pack, round_capacity, unpack
from .recording import GraphMemory

__all__ = [
    "GraphMemory",
    "MaskedRunner",
    "Packed",
    "PackedRunner",
    "key_index",
    "masked_attention",
    "pack",
    "round_capacity",
    "run_masked",
    "run_packed",
    "unpack",
    "varlen_attention",
]

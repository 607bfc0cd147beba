"""Fusion heads: one set of logits from the branches' logits."""

from .base import FUSIONS, INPUTS, Fusion, create_fusion, fall_back, fuse_branches, fused_logits, register_fusion, with_fallback
from .confidence import Average, MaxConfidence, Robust
from .learned import ConcatMLP, WeightedLogits
from .objectness import ObjectnessMaxConfidence
from .prior import MetadataPrior
from .scaled import MaxScaledConfidence, ScaledAverage, ScaledWeightedAverage

__all__ = [
    "FUSIONS",
    "INPUTS",
    "Average",
    "ConcatMLP",
    "Fusion",
    "MaxConfidence",
    "MaxScaledConfidence",
    "MetadataPrior",
    "ObjectnessMaxConfidence",
    "Robust",
    "ScaledAverage",
    "ScaledWeightedAverage",
    "WeightedLogits",
    "create_fusion",
    "fall_back",
    "fuse_branches",
    "fused_logits",
    "register_fusion",
    "with_fallback",
]

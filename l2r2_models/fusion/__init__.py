"""Fusion heads, which combine the logits of the branches into one set of logits."""

from .agreement import Agreement, TwoWorlds
from .base import FUSIONS, INPUTS, Fusion, create_fusion, fall_back, fuse_branches, fused_logits, register_fusion, with_fallback
from .batch import Adapted, GroupShare, fit_batch, fuse_groups, shares_of
from .confidence import Average, MaxConfidence, Robust
from .grouping import Grouping
from .learned import ConcatMLP, WeightedLogits
from .objectness import ObjectnessMaxConfidence
from .prior import MetadataPrior, PriorColumn
from .scaled import MaxScaledConfidence, ScaledAverage, ScaledWeightedAverage

__all__ = [
    "FUSIONS",
    "INPUTS",
    "Adapted",
    "Agreement",
    "Average",
    "ConcatMLP",
    "Fusion",
    "GroupShare",
    "Grouping",
    "MaxConfidence",
    "MaxScaledConfidence",
    "MetadataPrior",
    "ObjectnessMaxConfidence",
    "PriorColumn",
    "Robust",
    "ScaledAverage",
    "ScaledWeightedAverage",
    "TwoWorlds",
    "WeightedLogits",
    "create_fusion",
    "fall_back",
    "fit_batch",
    "fuse_branches",
    "fuse_groups",
    "fused_logits",
    "register_fusion",
    "shares_of",
    "with_fallback",
]

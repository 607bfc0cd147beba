"""Fusion heads: one set of logits from the branches' logits."""

from .base import FUSIONS, Fusion, create_fusion, register_fusion
from .confidence import Average, MaxConfidence, Robust

__all__ = ["FUSIONS", "Average", "Fusion", "MaxConfidence", "Robust", "create_fusion", "register_fusion"]

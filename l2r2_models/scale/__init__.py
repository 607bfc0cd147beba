"""Bulk work on Ray Data, for more images than one process can take; needs the extra `ray`."""

from .audit import answers_on_ray
from .evaluate import logits_on_ray
from .jobs import Report
from .localize import localize
from .output import read_table
from .predict import predict

__all__ = ["Report", "answers_on_ray", "localize", "logits_on_ray", "predict", "read_table"]

"""Bulk work on Ray Data, for more images than one process can take; needs the extra `ray`."""

from .jobs import Report
from .localize import localize
from .output import read_table
from .predict import predict

__all__ = ["Report", "localize", "predict", "read_table"]

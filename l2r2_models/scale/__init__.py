"""Bulk work on Ray Data, for more images than one process can take; needs the extra `ray`."""

from .output import read_table
from .predict import Report, predict

__all__ = ["Report", "predict", "read_table"]

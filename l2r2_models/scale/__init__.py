"""Bulk work on Ray Data, for more images than one process can take; needs the extra `ray`."""

from .predict import predict

__all__ = ["predict"]

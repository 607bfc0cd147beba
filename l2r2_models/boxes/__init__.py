"""Box files: reading and writing the common formats as one table, and joining its entries to images by path."""

from .read import entries_of_rows, read_boxes, read_rows
from .rle import Rle
from .table import Box, BoxEntry, BoxTable, Frame
from .write import FORMATS, write_boxes

__all__ = ["FORMATS", "Box", "BoxEntry", "BoxTable", "Frame", "Rle", "entries_of_rows", "read_boxes", "read_rows", "write_boxes"]

"""Images in shards, by random access: a path such as `data/train-00000.tar/cam/1.jpg` is read as if it were a file.

A shard is a WebDataset (`.tar`) or a Parquet file with a column of encoded images. It is indexed once; from then on, an image in
a tar is one seek, and one in Parquet is a read of its row group.
"""

from .index import indexed_now, members_of
from .layout import (
    MASK,
    MASKS,
    OF_MASK,
    SUFFIXES,
    Header,
    check_end,
    check_row_group,
    columns_of,
    encoded,
    inside,
    largest_row_group,
    mask_column,
    names_of_rows,
    opened,
)
from .read import read, state_of

__all__ = [
    "MASK",
    "MASKS",
    "OF_MASK",
    "SUFFIXES",
    "Header",
    "check_end",
    "check_row_group",
    "columns_of",
    "encoded",
    "indexed_now",
    "inside",
    "largest_row_group",
    "mask_column",
    "members_of",
    "names_of_rows",
    "opened",
    "read",
    "state_of",
]

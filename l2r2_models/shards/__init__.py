"""Images in shards, by random access: a path such as `data/train-00000.tar/cam/1.jpg` is read as if it were a file.

A shard is a WebDataset (`.tar`) or a Parquet file with a column of encoded images. It is indexed once; from then on, an image in
a tar is one seek, and one in Parquet is a read of its row group.
"""

from .index import BLOCK, indexed_now, members_of
from .layout import MASK, MASKS, OF_MASK, SUFFIXES, columns_of, encoded, inside, largest_row_group, mask_column, name_of_row
from .read import read, shards_in, state_of

__all__ = [
    "BLOCK",
    "MASK",
    "MASKS",
    "OF_MASK",
    "SUFFIXES",
    "columns_of",
    "encoded",
    "indexed_now",
    "inside",
    "largest_row_group",
    "mask_column",
    "members_of",
    "name_of_row",
    "read",
    "shards_in",
    "state_of",
]

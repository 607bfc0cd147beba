"""Joint fusion by group on Ray Data: a `groupby` over the branch logits that `OUT/_logits` keeps."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..fusion import Grouping, GroupShare
from ..io import pyarrow
from ..predict.adapt import Adapter, adapt_records
from ..predict.formats import escaped
from .output import Output
from .partitions import hashed
from .places import Place
from .results import Rows

FOLDER = "_logits"


@dataclass(frozen=True)
class Groups:
    """The groups of images.

    Attributes:
        grouping: rule for grouping.
        of_column: group by image name, for a rule on a metadata column.
    """

    grouping: Grouping
    of_column: Mapping[str, str]

    def of(self, name: str) -> str:
        """Return the group of an image."""
        return self.of_column[name] if name in self.of_column else self.grouping.of([name], [{}])[0]

    def table(self, rows: Rows) -> Any:
        """Return the records of a partition as an Arrow table with their groups and their order."""
        pa, _ = pyarrow()
        names = [name for name, _ in rows.records]
        text = [escaped(name) for name in names]
        records = [record for _, record in rows.records]
        columns = {"file": text, "group": [self.of(name) for name in names], "row": range(len(names)), "record": records}
        return pa.table(
            {name: pa.array(values, pa.int64() if name == "row" else pa.string()) for name, values in columns.items()}
        )


def _read(batch: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the records of each partition, with its number."""
    pa, parquet = pyarrow()
    for number, data in zip(batch["part"], batch["place"]):
        place: Place = pickle.loads(data)
        with place.filesystem.open_input_file(place.path) as stream:
            table = parquet.read_table(stream, columns=["group", "row", "record"]).replace_schema_metadata(None)
        yield table.append_column("part", pa.array([int(number)] * table.num_rows, pa.int64()))


def _fuse(group: Mapping[str, Any], adapter: Adapter) -> dict[str, list[Any]]:
    """Return the rows of a group, in the order of the images, and its share of misleading backgrounds."""
    order = sorted(range(len(group["row"])), key=lambda i: (group["part"][i], group["row"][i]))
    records = [json.loads(group["record"][i]) for i in order]
    name = str(group["group"][0])
    found = list(adapt_records(adapter, lambda: records, {record["file"]: name for record in records}))
    data = pickle.dumps((Rows.of(found), adapter.shares.get(name)), pickle.HIGHEST_PROTOCOL)
    return {"group": [name], "data": [data]}


def fuse_groups(
    ray: Any, logits: Output, keys: Sequence[str], adapter: Adapter, out: Output
) -> Iterator[tuple[str, tuple[str, GroupShare | None]]]:
    """Fuse the images of complete partitions by group, write one partition per group, and yield its key, name and share.

    A group must fit into the memory of a worker.
    """
    files = [{"part": number, "place": pickle.dumps(logits.file(key))} for number, key in enumerate(keys)]
    data = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(_read, batch_size=1, num_cpus=1)
    cores = int(ray.cluster_resources().get("CPU", 1))
    groups = data.groupby("group", num_partitions=min(4 * cores, len(files)))
    fused = groups.map_groups(partial(_fuse, adapter=adapter), batch_format="numpy")
    for batch in fused.iter_batches(batch_size=None, prefetch_batches=0):
        for group, content in zip(batch["group"], batch["data"]):
            rows, share = pickle.loads(content)
            key = hashed((str(group), list(keys)))
            out.write(key, rows.table, rows.tally)
            yield key, (str(group), share)

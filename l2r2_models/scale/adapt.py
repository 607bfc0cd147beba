"""Joint fusion by group on Ray Data: a `groupby` over the branch logits that `OUT/_logits` keeps."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..boxes.parquet import pyarrow
from ..fusion import Grouping, GroupShare
from ..predict.adapt import Adapter, adapt_records
from .output import Output
from .partitions import hashed
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
        text = [name.encode("utf-8", errors="backslashreplace").decode() for name in names]
        records = [record for _, record in rows.records]
        columns = {"file": text, "group": [self.of(name) for name in names], "row": range(len(names)), "record": records}
        return pa.table(
            {name: pa.array(values, pa.int64() if name == "row" else pa.string()) for name, values in columns.items()}
        )


class FuseGroup:
    """Fuse the images of one group jointly."""

    def __init__(self, adapter: Adapter, order: Mapping[str, int]) -> None:
        self.adapter, self.order = adapter, order

    def __call__(self, group: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Return the rows of a group, in the order of the images, and its share of misleading backgrounds."""
        parts = [self.order[str(path).rpartition("/")[2]] for path in group["path"]]
        order = sorted(range(len(parts)), key=lambda i: (parts[i], group["row"][i]))
        records = [json.loads(group["record"][i]) for i in order]
        name = str(group["group"][0])
        found = list(adapt_records(self.adapter, lambda: records, {record["file"]: name for record in records}))
        for record in found:
            for o in record.get("objects", ()):
                o.pop("logits", None)
        rows = replace(Rows.of(found), records=())
        data = pickle.dumps((rows, self.adapter.shares.get(name)), pickle.HIGHEST_PROTOCOL)
        return {"group": [name], "data": [data]}


def fuse_groups(
    ray: Any, logits: Output, keys: Sequence[str], adapter: Adapter, out: Output
) -> Iterator[tuple[str, tuple[str, GroupShare | None]]]:
    """Fuse the images of complete partitions by group, write one partition per group, and yield its key, name and share.

    A group must fit into the memory of a worker.
    """
    files = [logits.file(key) for key in keys]
    order = {file.path.rpartition("/")[2]: number for number, file in enumerate(files)}
    data = ray.data.read_parquet([file.path for file in files], filesystem=files[0].filesystem, include_paths=True)
    cores = int(ray.cluster_resources().get("CPU", 1))
    grouped = data.groupby("group", num_partitions=min(4 * cores, len(files)))
    for batch in grouped.map_groups(FuseGroup(adapter, order), batch_format="numpy").iter_batches(batch_size=None):
        for group, content in zip(batch["group"], batch["data"]):
            rows, share = pickle.loads(content)
            key = hashed((str(group), list(keys)))
            out.write(key, rows.table, rows.tally)
            yield key, (str(group), share)

"""The rows of `l2r2 predict --engine ray` on two nodes of which one is killed, compared with those of one process.

    python benchmarks/scale/killed_node.py RUN DATA --split test_id [--batch-size 16]

The nodes have one core each and run inside this machine. One is killed after three partitions. Prints the number of images whose
label differs, the number of scores that differ, and the largest difference; fails if the images or their order differ.
"""

import argparse
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pyarrow import parquet

from l2r2_models import Predictor
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.scale import predict, read_table

os.environ.setdefault("RAY_worker_niceness", "0")  # on a busy machine, yielding workers would hardly start
STORE = 80_000_000  # bytes of the object store per node, the smallest that Ray takes
PARTITION, KILLED_AFTER = 40, 3


def on_two_nodes(data: Path, run: Path, out: Path, split: str | None, options: dict[str, Any]) -> int:
    """Predict, and kill a node in between; returns the number of partitions."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    node, _ = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)

    def kill(results: Iterable[Any], total: int) -> Iterator[Any]:
        for done, result in enumerate(results, 1):
            if done == KILLED_AFTER:
                cluster.remove_node(node, allow_graceful=False)
            yield result

    try:
        report = predict([data], run, out, split=split, partition_size=PARTITION, progress=kill, **options)
        assert sum(n["Alive"] for n in ray.nodes()) == 2  # the head and one node
        return report.partitions
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    options = {"workers": 0, "batch_size": arguments.batch_size}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        partitions = on_two_nodes(arguments.data, arguments.run, folder / "out", arguments.split, options)
        found = read_table(folder / "out").to_pylist()
        predictor = Predictor.from_pretrained(arguments.run, device="cpu", **options)
        predict_to_file(predictor, gather([arguments.data], split=arguments.split), folder / "one.parquet")
        wanted = parquet.read_table(folder / "one.parquet").to_pylist()
    if [row["file"] for row in found] != [row["file"] for row in wanted]:
        raise SystemExit(f"{len(found)} images in {partitions} partitions are not the {len(wanted)} of one process")
    gaps = [abs(a["score"] - b["score"]) for a, b in zip(found, wanted)]
    labels = sum(a["label"] != b["label"] for a, b in zip(found, wanted))
    print(
        f"{len(found)} images, {partitions} partitions: {labels} labels and {sum(gap > 0 for gap in gaps)} scores differ, "
        f"by at most {max(gaps):.6f}"
    )


if __name__ == "__main__":
    main()

"""Ray clusters inside this machine."""

import os

import pytest

STORE = 80_000_000  # bytes of the object store per node, the smallest that Ray takes
# Ray lets its workers yield to every other process; on a busy machine they would hardly start
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture
def one_node():
    import ray

    ray.init("local", num_cpus=1, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def two_nodes():
    """A head without cores, and two nodes of one core; yields the cluster and the nodes."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()

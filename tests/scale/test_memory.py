"""A million images: what the process that started the command holds does not grow with those that are done."""

import pickle
import resource
from pathlib import Path

import pytest

from l2r2_models import Predictor
from l2r2_models.predict.inputs import Inputs, gather
from l2r2_models.predict.predict_files import header_of
from l2r2_models.scale.output import Output, read_table
from l2r2_models.scale.partitions import of_files
from l2r2_models.scale.results import Assembly, Rows

MILLION = 1_000_000


def held():
    """Megabytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
def test_a_million_rows_arrive_in_flat_memory(run, dataset, tmp_path):
    predictor = Predictor.from_pretrained(run, device="cpu")
    inputs = gather([dataset], split="train")
    records = [p.to_dict() for p in predictor.predict_files(inputs.paths, inputs.entries)] * 100
    data = pickle.dumps(Rows.of(records))
    output, assembly, memory = Output(tmp_path / "out", header_of(predictor)), Assembly(), []
    keys = [f"{i:020d}" for i in range(-(-MILLION // len(records)))]
    for key in keys:
        assembly.add(key, 0, pickle.loads(data))
        rows = assembly.add(key, 1, None)
        output.write(key, rows.table, rows.tally)
        memory.append(held())
    output.finish(keys)
    assert memory[-1] - memory[len(memory) // 10] < 30
    assert read_table(tmp_path / "out").num_rows >= MILLION


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
def test_the_plan_of_a_million_images_is_small():
    names = (Path(f"photos/site{i % 1000:04}/2026-05-{i % 28:02}/IMG_{i:07}.JPG") for i in range(MILLION))
    inputs = Inputs(tuple(names), {}, {}, {})
    before = held()
    work = [pickle.dumps(part) for part in of_files(inputs, lambda name: None, 1024)]
    assert held() - before < 400 and sum(map(len, work)) < 100 * MILLION

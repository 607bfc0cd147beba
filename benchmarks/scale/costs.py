"""What a photo costs at each stage of `l2r2 predict --engine ray`, and what that means for millions of them.

    python benchmarks/scale/costs.py measure RUN IMAGES     # CPU time and bytes per photo, by stage; no cluster
    python benchmarks/scale/costs.py simulate               # replays them: hours and efficiency by photos and workers
    python benchmarks/scale/costs.py workers RUN IMAGES     # the engine with 1 and 2 workers, in turns

`measure` counts the CPU time of its own process, so that other jobs on the machine matter little. `workers` can only compare.
"""

import argparse
import csv
import heapq
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from l2r2_models import Predictor
from l2r2_models.predict.predict_files import header_of
from l2r2_models.scale import predict
from l2r2_models.scale.engine import connected
from l2r2_models.scale.output import Output
from l2r2_models.scale.partitions import SIZE
from l2r2_models.scale.results import Assembly, Rows
from l2r2_models.scale.sources import find
from l2r2_models.scale.stages import Decode, Plan, sources_of

COSTS = Path(__file__).parent.parent / "results" / "scale_costs.csv"
PHOTOS, WORKERS = (10**6, 10**8, 10**9), (1, 2, 16, 256, 4096)


class Clock(dict):
    """Seconds of CPU time by stage, per photo."""

    @contextmanager
    def of(self, stage: str, photos: int) -> Iterator[None]:
        start = time.process_time()
        yield
        self[stage] = self.get(stage, 0.0) + (time.process_time() - start) / photos


def measure(run: Path, images: Path, limit: int, options: dict) -> dict[str, float]:
    """CPU seconds (`_s`) and bytes (`_bytes`) per photo of each stage, measured in one process with one thread."""
    predictor = Predictor.from_pretrained(run, device="cpu", workers=0, **options)
    clock = Clock()
    found = find([images])
    found = replace(found, inputs=found.inputs.evenly(limit))
    pickle.dumps(Rows.of([{"file": "a.jpg", "failure": "so that imports are not measured"}]))
    n = len(found.inputs.paths)
    with clock.of("plan_s", n):
        parts = list(found.partitions(predictor.localizer))
        work = [pickle.dumps(part) for part in parts]
    plan = Plan(str(run), predictor.checkpoint.digest, {"workers": 0, **options}, predictor.rules)
    sources = [source for data in work for source in sources_of(pickle.loads(data), None)]
    sizes = [Path(source.name).stat().st_size for source in sources]
    with clock.of("read_s", n):
        for source in sources:
            Path(source.name).read_bytes()
    with clock.of("decode_s", n):
        decoded = [predictor.decode(s.name, s.entry, s.mask) for s in sources]
    with clock.of("cut_s", n):
        items = [predictor.network.cut(item, item.rows) for item in decoded]
    with clock.of("network_s", n):
        predictions = list(predictor.predict_items(items))
    with clock.of("rows_s", n):
        data = pickle.dumps(Rows.of([p.to_dict() for p in predictions]))
    with tempfile.TemporaryDirectory() as folder, clock.of("write_s", n):
        assembly, output = Assembly(), Output(f"{folder}/out", header_of(predictor))
        assembly.add("key", 0, pickle.loads(data))
        whole = assembly.add("key", 1, None)
        assert whole is not None
        output.write("key", whole.table, whole.tally)
        clock["output_bytes"] = output.file("key").path and Path(output.file("key").path).stat().st_size / n
    decode = Decode(plan)
    slices = [row["data"][0] for part, data in zip(parts, work) for row in decode({"key": [part.key], "data": [data]})]
    clock |= {"photo_bytes": sum(sizes) / n, "plan_bytes": sum(map(len, work)) / n, "slice_bytes": sum(map(len, slices)) / n}
    return {"photos": n, **clock}


def simulate(costs: dict[str, float], photos: int, workers: int, seed: int = 0, start: float = 60.0, loss: float = 0.0) -> float:
    """Seconds that a job takes: partitions of random size go to free workers, and one driver plans and writes.

    Args:
        costs: see `measure`.
        photos: number of photos.
        workers: number of workers.
        seed: random seed.
        start: seconds until a worker has loaded its model.
        loss: probability that a worker is lost while it works on a partition, which is then done again by a new one.
    """
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.geometric(1 / SIZE, 2 * photos // SIZE + 16), 4 * SIZE)
    ends = np.minimum(sizes.cumsum(), photos)
    sizes = np.diff(ends[: int(np.searchsorted(ends, photos)) + 1], prepend=0)
    work = costs["read_s"] + costs["decode_s"] + costs["cut_s"] + costs["network_s"] + costs["rows_s"]
    driver = photos * costs["plan_s"]
    busy = [(driver + start, 0)] * min(workers, len(sizes))  # when each worker is done, with how many photos
    lost = rng.random(len(sizes)) < loss
    for size, again in zip(sizes.tolist(), lost.tolist()):
        done, written = busy[0]
        driver = max(driver, done) + written * costs["write_s"]
        wasted = rng.random() * size * work + start if again else 0.0
        heapq.heapreplace(busy, (done + wasted + size * work, size))
    for done, written in sorted(busy):
        driver = max(driver, done) + written * costs["write_s"]
    return driver


def table(costs: dict[str, float]) -> Iterable[tuple]:
    """Rows of photos, workers, hours, and efficiency: the share of the workers' time that is work."""
    work = sum(costs[name] for name in ("read_s", "decode_s", "cut_s", "network_s", "rows_s"))
    for photos in PHOTOS:
        for workers in WORKERS:
            seconds = simulate(costs, photos, workers, loss=0.001)
            yield photos, workers, seconds / 3600, photos * work / (workers * seconds)


def workers(run: Path, images: Path, rounds: int, options: dict) -> None:
    """Run the engine with 1 and 2 workers in turns; the time is that from the first finished partition to the last."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with connected():
        for _ in range(rounds):
            for count in times:
                stamps: list[tuple[float, int]] = []

                def timed(results: Iterable, total: int, stamps: list = stamps) -> Iterator:
                    for key, rows in results:
                        stamps.append((time.perf_counter(), rows.tally.images))
                        yield key, rows

                with tempfile.TemporaryDirectory() as folder:
                    settings = {"partition_size": 64, "actors": count, "workers": 0, "progress": timed}
                    predict([images], run, Path(folder) / "out", **settings, **options)
                rate = sum(n for _, n in stamps[count:]) / (stamps[-1][0] - stamps[count - 1][0])
                times[count].append(rate)
                print(f"{count} workers: {rate:.1f} photos/s", flush=True)
    rates = {count: statistics.median(found) for count, found in times.items()}
    print(json.dumps({"rounds": rounds, "rates": rates, "ratio": rates[2] / rates[1]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "simulate", "workers"])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=COSTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "measure":
        costs = measure(given.run, given.images, given.limit, {})
        given.csv.write_text("cost,per_photo\n" + "".join(f"{name},{value:.6g}\n" for name, value in costs.items()))
        print(given.csv.read_text())
    elif given.what == "workers":
        workers(given.run, given.images, given.rounds, {})
    else:
        costs = {row["cost"]: float(row["per_photo"]) for row in csv.DictReader(given.csv.open())}
        for photos, count, hours, efficiency in table(costs):
            print(f"{photos:>13,} photos  {count:>5} workers  {hours:>12,.1f} h  {100 * efficiency:.0f} %")


if __name__ == "__main__":
    main()

"""How the cost of prediction and training grows: with photos, boxes, batch and view size; accuracy and memory beside it.

    python benchmarks/speed/growth.py DATA [--tables photos boxes batch step accuracy] [--run RUN] [--images 16] [--rounds 3]

DATA is fod_a_shift. Photos are its photographs, enlarged to the stated sizes and saved as JPEG (quality 90) with their boxes.
Times are processor time of one thread, `ms` per image or training step, so that other jobs on the machine matter less than for
the clock; the rows of a table alternate, and medians over the rounds are given. `ratio` is the row's time over that of the
table's first row. `memory` is the peak of what PyTorch allocates above the loaded networks, in MiB, as
`torch.cuda.max_memory_allocated` counts it on a GPU; the memory of the process also depends on how the C library reuses what was
freed.

- photos: full and fg views, predicted: a plain timm classifier, two timm networks with Pillow crops (what L2R2 replaces), L2R2.
- boxes: 1 to 50 per photo; by hand, each box is one more crop for the second network.
- batch: L2R2 with 1 to 32 objects per pass.
- step: one training step on 8 photos (forward, backward, AdamW): a plain network; L2R2 with both views at 224, at 128 + 224, and
  with one branch at a time (`branch_backward=separate`).
- accuracy (needs --run, a fine-tuned run): on --limit images of test_id and test_ood each, of the fused prediction and of each
  branch, at the run's own sizes and with a smaller full view.

Appends to benchmarks/results/growth_cpu.csv after each table.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import timm
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from l2r2_models.boxes import BoxEntry
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.predict.inputs import Inputs, gather
from l2r2_models.predict.predict_files import accuracy_by_branch
from l2r2_models.predict.predictor import Predictor

RESULTS = Path(__file__).parent.parent / "results" / "growth_cpu.csv"
TABLES = ("photos", "boxes", "batch", "step", "accuracy")
Calls = dict[str, Callable[[], object]]


def photos(folder: Path, source: Inputs, count: int, size: tuple[int, int], boxes: int = 1) -> Inputs:
    """Enlarge photographs; further boxes are the first one, shifted."""
    folder.mkdir()
    entries = {}
    for i, path in enumerate(source.evenly(count).paths):
        image = Image.open(path).convert("RGB")
        scale = [new / old for new, old in zip(size, image.size)]
        x0, y0, x1, y1 = (v * s for v, s in zip(source.entries[str(path)].boxes[0], scale * 2))
        shifts = [(0.7 * k / boxes * (size[0] - x1 + x0), 0.9 * k / boxes * (size[1] - y1 + y0)) for k in range(1, boxes)]
        moved = [(dx, dy, dx + x1 - x0, dy + y1 - y0) for dx, dy in shifts]
        out = folder / f"{i:03}.jpg"
        image.resize(size, Image.Resampling.BICUBIC).save(out, quality=90)
        entries[str(out)] = BoxEntry(((x0, y0, x1, y1), *moved), (1.0,) * boxes, ("",) * boxes)
    return replace(source, paths=tuple(map(Path, entries)), entries=entries, masks={})


def by_hand(inputs: Inputs, networks: list[torch.nn.Module], batch: int) -> Callable[[], None]:
    """A plain network on whole photos, or a second one on the crop of each box too."""
    transform = timm.data.create_transform(input_size=(3, 224, 224), interpolation="bicubic", crop_pct=1.0)

    @torch.inference_mode()
    def call() -> None:
        whole, crops = [], []
        for path in inputs.paths:
            image = Image.open(path).convert("RGB")
            whole.append(transform(image))
            if len(networks) > 1:
                crops += [transform(image.crop(box)) for box in inputs.entries[str(path)].boxes]
        for network, views in zip(networks, (whole, crops)):
            for start in range(0, len(views), batch):
                network(torch.stack(views[start : start + batch])).softmax(-1).max(-1)[0].tolist()

    return call


def predicting(run: Path, inputs: Inputs, batch: int, **options: object) -> Callable[[], None]:
    predictor = Predictor(load_checkpoint(run), workers=0, batch_size=batch, max_objects=50, device="cpu", **options)
    return lambda: [p.to_dict() for p in predictor.predict_files(inputs.paths, inputs.entries)] and None


def steps(backbone: str, batch: int) -> Calls:
    """One training step of each network."""
    labels = torch.arange(batch) % 10

    def step(model: torch.nn.Module, views: dict[str, torch.Tensor], separate: bool = False) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def call() -> None:
            optimizer.zero_grad()
            for part in [{b: v} for b, v in views.items()] if separate else [views]:
                two = hasattr(model, "forward_branches")
                logits = model.forward_branches(**part).values() if two else [model(part["full"])]
                sum(cross_entropy(z, labels) for z in logits).backward()
            optimizer.step()

        return call

    def views(full: int) -> dict[str, torch.Tensor]:
        return {"full": torch.randn(batch, 3, full, full), "fg": torch.randn(batch, 3, 224, 224)}

    def l2r2() -> torch.nn.Module:
        return timm.create_model("l2r2", backbone=backbone, num_classes=10, views={"size": 224}).train()

    plain = timm.create_model(backbone, num_classes=10).train()
    return {
        "plain, 224": step(plain, {"full": views(224)["full"]}),
        "L2R2, 224 + 224": step(l2r2(), views(224)),
        "L2R2, 128 + 224": step(l2r2(), views(128)),
        "L2R2, 224 + 224, separate": step(l2r2(), views(224), separate=True),
        "L2R2, 128 + 224, separate": step(l2r2(), views(128), separate=True),
    }


def measure(calls: Calls, rounds: int) -> dict[str, tuple[float, float]]:
    """Processor seconds and peak memory of each call."""
    peaks = {name: allocated(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: (statistics.median(spent), peaks[name]) for name, spent in times.items()}


def allocated(call: Callable[[], object]) -> float:
    """Peak of the memory that PyTorch allocates during a call, above the use before it, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        trace = json.loads(Path(file.name).read_text())["traceEvents"]
    events = [event["args"] for event in trace if event["name"] == "[memory]"]
    totals = [event["Total Allocated"] for event in events]  # also counts what earlier profiles saw allocated, but not freed
    return (max(totals) - (totals[0] - events[0]["Bytes"])) / 2**20


def accuracies(run: Path, data: Path, limit: int) -> list[dict[str, object]]:
    """Accuracy of a run, and its time per image."""
    found = []
    for full in (None, 96, 64):
        checkpoint = load_checkpoint(run)
        spec = checkpoint.model.view_spec
        if full is not None:
            checkpoint.model.view_spec = replace(spec, sizes={**spec.sizes, "full": full})
        predictor = Predictor(checkpoint, workers=0, device="cpu")
        right, spent = {}, 0.0
        for split in ("test_id", "test_ood"):
            inputs = gather([data], split=split).evenly(limit)
            start = time.process_time()
            images = [p.to_dict() for p in predictor.predict_files(inputs.paths, inputs.entries)]
            spent += time.process_time() - start
            right[split] = accuracy_by_branch(images, inputs.labels)
        sides = " + ".join(str(checkpoint.model.view_spec.size_of(b)) for b in ("full", "fg"))
        for branch in ("fused", "fg", "full"):
            scores = {split: round(100 * by[branch], 1) for split, by in right.items()}
            found.append({"row": f"{branch}, {sides}", "ms": round(1e3 * spent / (2 * limit), 2), **scores})
    return found


def tables(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Calls, int]]:
    """The tables that are measured alike: name, calls, and images per call."""
    model = timm.create_model("l2r2", backbone=options.backbone, num_classes=10, fusion="robust")
    run = folder / "run"
    save_checkpoint(model, run, [f"class {i}" for i in range(10)])
    networks = [timm.create_model(options.backbone, num_classes=10).eval() for _ in range(2)]
    source = gather([options.data], split="test_id")

    def both(inputs: Inputs) -> Calls:
        return {"two timm networks, Pillow crops": by_hand(inputs, networks, 32), "L2R2": predicting(run, inputs, 32)}

    if "photos" in options.tables:
        for width, height in ((500, 400), (1600, 1200), (4000, 3000)):
            count = max(2, options.images // (1 if width < 1000 else 4))
            inputs = photos(folder / f"photos{width}", source, count, (width, height))
            plain = {"plain timm classifier": by_hand(inputs, networks[:1], 32)}
            yield f"photos {width}x{height}", {**both(inputs), **plain}, count
    if "boxes" in options.tables:
        for boxes in (1, 5, 20, 50):
            yield f"{boxes} boxes", both(photos(folder / f"boxes{boxes}", source, 2, (1000, 800), boxes)), 2
    if "batch" in options.tables:
        inputs = photos(folder / "batch", source, 32, (500, 400))
        yield "batch", {f"L2R2, batch {batch}": predicting(run, inputs, batch) for batch in (1, 4, 16, 32)}, 32
    if "step" in options.tables:
        yield "step", steps(options.train_backbone, 8), 1


def write(lines: list[dict[str, object]], options: argparse.Namespace) -> None:
    about = {"backbone": options.backbone, "train_backbone": options.train_backbone, "rounds": options.rounds}
    about |= {name: version(name) for name in ("torch", "timm", "pillow")} | {"date": str(datetime.date.today())}
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as stream:
        columns = ["table", "row", "ms", "ratio", "memory_mib", "test_id", "test_ood", *about]
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**line, **about} for line in lines)
    for line in lines:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--train-backbone", default="convnext_atto", help="without batch norm, which `separate` refuses")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=90, help="images per split for the accuracy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        for table, calls, images in tables(options, Path(folder)):
            found = measure(calls, options.rounds)
            first = next(iter(found.values()))[0]
            lines = [
                {
                    "table": table,
                    "row": row,
                    "ms": round(1e3 * seconds / images, 2),
                    "ratio": round(seconds / first, 2),
                    "memory_mib": round(peak, 1),
                }
                for row, (seconds, peak) in found.items()
            ]
            write(lines, options)
    if "accuracy" in options.tables and options.run:
        write([{"table": "accuracy", **line} for line in accuracies(options.run, options.data, options.limit)], options)


if __name__ == "__main__":
    main()

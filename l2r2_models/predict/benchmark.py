"""Time the stages of prediction, and a plain network of the same backbone for comparison; see `l2r2 benchmark`."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor

from ..boxes import BoxEntry
from ..errors import L2R2Error
from ..images import load_image
from ..pipe import in_order
from ..zero_shot.model import ZeroShotNetwork
from .inputs import Inputs
from .items import Job, Pending
from .prediction import Prediction
from .predictor import Predictor

STAGES = ("decode", "cut", "network", "fuse", "write")
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Benchmark:
    """Result of `run_benchmark`.

    Attributes:
        model: name of the checkpoint.
        device: name of the device.
        precision: precision of the network.
        workers: number of decoding threads.
        cascade: loss of the predictor's cascade in percentage points; None without one.
        images: number of images that were classified.
        objects: number of objects that were classified.
        stages: seconds per image of each stage, run one after another in one thread: `decode` (read and decode), `cut` (views),
            `network` (all forward passes), `fuse`, and `write` (predictions as JSON). On a GPU, `network` includes cutting.
        rate: images per second from file to prediction, with overlapping stages: median over the repeats.
        plain: the same for a timm network of the same backbone with timm's transform and as many threads; 0 if not measured.
        rows: views per image that went through the backbone.
        memory: peak memory in bytes, of the GPU if there is one, else of the process.
    """

    model: str
    device: str
    precision: str
    workers: int
    cascade: float | None
    images: int
    objects: int
    stages: dict[str, float]
    rate: float
    plain: float
    rows: float
    memory: int

    def shares(self) -> dict[str, float]:
        """Return each stage's fraction of the total time."""
        total = sum(self.stages.values())
        return {name: seconds / total for name, seconds in self.stages.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def run_benchmark(
    predictor: Predictor, inputs: Inputs, *, repeats: int = 3, plain: bool = True, progress: Progress = lambda steps, _: steps
) -> Benchmark:
    """Measure a predictor on image files.

    Args:
        predictor: a predictor without a localizer.
        inputs: image files and their boxes.
        repeats: number of timed rounds, after one round of warm-up.
        plain: also measure a plain timm network, unless the model is zero-shot, whose backbone timm does not have.
        progress: wraps the iteration over the rounds.

    Raises:
        L2R2Error: when the predictor has a localizer, or no image can be read.
    """
    if predictor.localizer is not None:
        raise L2R2Error("The benchmark does not run localizers; pass a file of boxes.")
    paths = list(inputs.paths)
    rows: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        for module in (predictor.model.backbone, *predictor.model.branch_backbones.values())
    ]
    known = not isinstance(predictor.model, ZeroShotNetwork)
    network = _plain_network(predictor) if plain and known else None
    rates: dict[str, list[float]] = {"l2r2": [], "plain": []}
    predictions: list[Prediction] = []
    for round in progress(range(repeats + 1), repeats + 1):
        rows.clear()
        start = time.perf_counter()
        predictions = [p for p in predictor.predict_files(paths, inputs.entries, inputs.masks) if p.failure is None]
        if not predictions:
            raise L2R2Error(f"None of the {len(paths)} images can be read; pass other images.")
        elapsed = time.perf_counter() - start
        other = 0.0 if network is None else _time_plain(network, predictor, paths)
        if round:
            rates["l2r2"].append(len(paths) / elapsed)
            rates["plain"].append(len(paths) / other if other else 0.0)
    seen = sum(rows) / len(predictions)
    for hook in hooks:
        hook.remove()
    return Benchmark(
        predictor.checkpoint.name,
        _device_name(predictor.device),
        predictor.network.precision,
        predictor.workers,
        None if predictor.network.cascade is None else predictor.network.cascade.loss,
        len(predictions),
        sum(len(p.objects) for p in predictions),
        time_stages(predictor, inputs),
        median(rates["l2r2"]),
        median(rates["plain"]),
        seen,
        _peak(predictor.device),
    )


@torch.inference_mode()
def time_stages(predictor: Predictor, inputs: Inputs) -> dict[str, float]:
    """Return the seconds per image of each stage, run one after another in one thread; unreadable images are left out.

    Raises:
        L2R2Error: when no image can be read.
    """
    spent = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def clock(stage: str) -> Iterator[None]:
        _wait(predictor.device)
        start = time.perf_counter()
        with torch.profiler.record_function(f"l2r2: {stage}"):
            yield
            _wait(predictor.device)
        spent[stage] += time.perf_counter() - start

    count, jobs = 0, []

    def classify(part: Sequence[Job]) -> None:
        with clock("network"):
            answered = predictor.network(part)
        with clock("fuse"):
            predictor.model.fuse(answered.output.branches(), answered.output.has_fg)
        with clock("write"):
            answers = predictor.answers(answered, part)
            for job, answer in zip(part, answers):
                json.dumps(Prediction(job.pending.item.name, (answer,)).to_dict())

    for path in inputs.paths:
        try:
            with clock("decode"):
                item = predictor.decode(path, inputs.entries.get(str(path)), inputs.masks.get(str(path)))
        except L2R2Error:
            continue
        count, rows = count + 1, item.rows or ()
        if predictor.device.type == "cpu":
            with clock("cut"):
                item = predictor.network.cut(item, rows)
        pending = Pending(item, rows)
        jobs += [Job(pending, number) for number in range(len(rows))]
        while len(jobs) >= predictor.network.most:
            classify(jobs[: predictor.network.most])
            jobs = jobs[predictor.network.most :]
    if jobs:
        classify(jobs)
    if not count:
        raise L2R2Error(f"None of the {len(inputs.paths)} images can be read; pass other images.")
    spent["network"] -= spent["fuse"]  # a call of the network also fuses
    return {stage: seconds / count for stage, seconds in spent.items()}


def _plain_network(predictor: Predictor) -> tuple[Any, Callable[[Image.Image], Tensor]]:
    """Return a timm network with the backbone of the model, and timm's transform for it."""
    model, spec = predictor.model, predictor.model.view_spec
    network: Any = timm.create_model(model.backbone_name, num_classes=model.num_classes, **model.backbone_kwargs)
    transform: Any = timm.data.create_transform(
        input_size=(3, spec.size, spec.size), interpolation=spec.interpolation, mean=spec.mean, std=spec.std, crop_pct=1.0
    )
    return network.to(predictor.device).eval(), transform


@torch.inference_mode()
def _time_plain(plain: tuple[Any, Callable[[Image.Image], Tensor]], predictor: Predictor, paths: Sequence[Path]) -> float:
    """Return the seconds that a plain classifier takes for the files that can be read."""
    network, transform = plain

    def load(path: Path) -> Tensor | None:
        try:
            return transform(load_image(path))
        except L2R2Error:
            return None

    start, batch = time.perf_counter(), []
    for view in in_order(load, paths, predictor.workers, ahead=predictor.batch_size):
        if view is not None:
            batch.append(view)
        if len(batch) == predictor.batch_size:
            network(torch.stack(batch).to(predictor.device)).softmax(-1).topk(1)[1].tolist()
            batch = []
    if batch:
        network(torch.stack(batch).to(predictor.device)).softmax(-1).topk(1)[1].tolist()
    return time.perf_counter() - start


def synthetic_photos(folder: Path, count: int, size: tuple[int, int] = (500, 400), boxes: int = 1, seed: int = 0) -> Inputs:
    """Write JPEG files of blobs and noise, with boxes that are a third as wide and high.

    Args:
        folder: an existing folder.
        count: number of images.
        size: `(width, height)` in pixels.
        boxes: number of boxes per image.
        seed: random seed.
    """
    draw = torch.Generator().manual_seed(seed)
    entries: dict[str, BoxEntry] = {}
    width, height = size
    for i in range(count):
        blobs = torch.randint(0, 256, (12, 16, 3), dtype=torch.uint8, generator=draw)
        image = Image.fromarray(blobs.numpy()).resize(size, Image.Resampling.BICUBIC)
        noise = torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=draw)
        grain = Image.frombytes("L", size, noise.numpy().tobytes())
        path = folder / f"{i:05}.jpg"
        Image.blend(image, grain.convert("RGB"), 0.06).save(path, quality=90)
        corners = (torch.rand(boxes, 2, generator=draw) * 2 / 3).tolist()
        found = tuple((x * width, y * height, (x + 1 / 3) * width, (y + 1 / 3) * height) for x, y in corners)
        entries[str(path)] = BoxEntry(found, (1.0,) * boxes, ("",) * boxes)
    return replace(Inputs((), {}, {}, {}), paths=tuple(map(Path, entries)), entries=entries)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

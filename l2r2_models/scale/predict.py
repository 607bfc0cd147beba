"""Predict any number of images on Ray Data, each exactly once, into a folder of Parquet partitions."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..fusion import Grouping, GroupShare
from ..predict.predict_files import adapter_of, header_of
from ..predict.predictor import Predictor
from ..predict.rules import Rules
from .adapt import FOLDER, fuse_groups
from .engine import connected, quiet
from .output import Output
from .partitions import SIZE, Partition
from .results import Assembly, Rows, Tally
from .sources import find
from .stages import Classify, Decode, Plan, Predict

Progress = Callable[[Iterable[tuple[str, Rows]], int], Iterable[tuple[str, Rows]]]


@dataclass(frozen=True)
class Report:
    """Summary of a bulk job.

    Attributes:
        partitions: number of partitions of the input.
        kept: number of those that were there before.
        tally: counts of the predictions in all of them.
        shares: fraction of misleading backgrounds by group, if predictions are adapted.
    """

    partitions: int
    kept: int
    tally: Tally
    shares: dict[str, GroupShare] = field(default_factory=dict)


def predict(
    sources: Sequence[str | Path],
    run: str | Path,
    out: str | Path,
    *,
    boxes: str | Path | None = None,
    split: str | None = None,
    rules: Callable[[Predictor], Rules] | None = None,
    adapt: str = "off",
    address: str | None = None,
    actors: int | None = None,
    decode_apart: bool | None = None,
    partition_size: int = SIZE,
    progress: Progress = lambda items, _: items,
    **options: Any,
) -> Report:
    """Predict images on Ray Data and write the predictions to a folder of Parquet files.

    The rows are those of `l2r2 predict -o out.parquet`. The same call continues after an interruption: finished partitions are
    kept, those of a lost worker are predicted again, and new or changed images change only the partitions that they are in.

    Args:
        sources: see `sources.find`.
        run: run folder or Hub id, which every worker loads.
        out: folder to write, as path or URL.
        boxes: box file.
        split: use only this split of the data sets.
        rules: returns the rules for naming classes, see `predict.rule_files.read_rules`; None for no rules.
        adapt: grouping of images taken at the same place, `folder` or `group:COLUMN`; their branch logits are kept in `out`, and
            there is one partition per group.
        address: Ray cluster to connect to, see `engine.connected`.
        actors: number of workers that hold the model; by default one per GPU, or per core if the cluster has no GPU.
        decode_apart: decode in workers of their own, which feed those that hold the model; by default if the cluster has GPUs.
        partition_size: images per partition, on average.
        progress: wraps the partitions; takes their iterable and their number.
        options: arguments of `Predictor`, e.g. `localizer`.

    Raises:
        L2R2Error: when Ray is missing, an option or an input is invalid, the folder was made with another model or other
            settings, is being written by another process, or cannot be written.

    >>> predict(["s3://traps/2026"], "runs/fungi", "s3://traps/predictions", localizer="head")  # doctest: +SKIP
    """
    if partition_size < 1 or (actors is not None and actors < 1):
        raise L2R2Error("The number of workers (--workers) and the partition size must be at least 1.")
    boxes = None if boxes is None else Path(boxes)
    options = {"workers": 0, **options}  # threads of each worker, which has one core
    predictor = _header_predictor(run, options)
    predictor = predictor.with_rules(rules(predictor) if rules is not None else Rules(predictor.labels))
    found = find(sources, boxes, split, given=predictor.localizer is None)
    header = {**header_of(predictor, found.oracle), "partition_size": partition_size}
    groups, adapter = None, None
    if (grouping := Grouping.parse(adapt)) is not None:
        groups, adapter = found.groups(grouping), adapter_of(predictor, grouping)
        predictor.keeping_logits()  # refuses options that skip a branch, before anything is written
        header["settings"]["adapt"] = str(grouping)
    output = Output(out, header)
    local = os.path.abspath(run) if Path(run).is_dir() else str(run)
    plan = Plan(local, predictor.checkpoint.digest, options, predictor.rules, groups is not None, found.boxes, os.getcwd())
    job = _Job(plan, address, actors, decode_apart)
    with output.writing():
        stored = output if groups is None else output.folder(FOLDER)
        parts = {part.key: part for part in found.partitions(predictor, groups, partition_size)}
        kept = stored.finished(list(parts))
        stored.start()
        tally = sum(kept.values(), Tally())
        todo = [part for key, part in parts.items() if key not in kept]
        for key, rows in progress(job.results(todo), len(todo)):
            stored.write(key, rows.table if groups is None else groups.table(rows), rows.tally)
            tally += rows.tally
        stored.finish(list(parts))
        report = Report(len(parts), len(kept), tally)
        if adapter is not None and parts:
            output.start()
            with connected(address) as ray, quiet(ray):
                fused = dict(fuse_groups(ray, stored, list(parts), adapter, output))
            output.finish(list(fused))
            report.shares.update({name: share for name, share in fused.values() if share is not None})
    return report


def _header_predictor(run: str | Path, options: Mapping[str, Any]) -> Predictor:
    """Load the predictor that the header describes, on the CPU, which need not have the precision of the workers."""
    predictor = Predictor.from_pretrained(run, **{**options, "device": "cpu", "precision": "fp32"})
    predictor.network.precision = options.get("precision", "fp32")
    return predictor


@dataclass(frozen=True)
class _Job:
    """How partitions are predicted; the attributes are arguments of `predict`."""

    plan: Plan
    address: str | None
    actors: int | None
    decode_apart: bool | None

    def results(self, todo: Sequence[Partition]) -> Iterator[tuple[str, Rows]]:
        """Yield key and rows of each partition as soon as it is complete."""
        if todo:
            with connected(self.address) as ray, quiet(ray):
                yield from _results(ray, todo, self.plan, self.actors, self.decode_apart)


def _results(
    ray: Any, todo: Sequence[Partition], plan: Plan, actors: int | None, decode_apart: bool | None
) -> Iterator[tuple[str, Rows]]:
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    count = min(actors or gpus or cores, len(todo))
    holding: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    arguments: dict[str, Any] = {"fn_constructor_args": (plan,), "batch_size": 1}
    work = [{"key": part.key, "data": pickle.dumps(part, pickle.HIGHEST_PROTOCOL)} for part in todo]

    def pool(size: int) -> Any:
        return ray.data.ActorPoolStrategy(min_size=1, max_size=size, initial_size=size)  # goes on with fewer if a node is lost

    data = ray.data.from_items(work, override_num_blocks=len(work))
    if gpus > 0 if decode_apart is None else decode_apart:
        decoders = max(1, cores - (0 if gpus else count))
        data = data.map_batches(Decode, compute=pool(decoders), num_cpus=1, **arguments)
        data = data.map_batches(Classify, compute=pool(count), **holding, **arguments)
    else:
        data = data.map_batches(Predict, compute=pool(count), **holding, **arguments)
    assembly = Assembly()
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
        for key, number, content in zip(batch["key"], batch["slice"], batch["data"]):
            if (rows := assembly.add(key, int(number), pickle.loads(content) if content else None)) is not None:
                yield key, rows

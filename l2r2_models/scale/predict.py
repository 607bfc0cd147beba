"""Predict any number of images on Ray Data, each exactly once, into a folder of Parquet partitions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..fusion import Grouping
from ..predict.predict_files import adapter_of, header_of
from ..predict.predictor import Predictor
from ..predict.rules import Rules
from .adapt import FOLDER, fuse_groups
from .engine import Engine, Work, connected, quiet
from .jobs import Progress, Report, fill
from .output import Output
from .partitions import SIZE
from .results import Rows
from .sources import find
from .stages import Classify, Decode, Plan, Predict


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
    engine = Engine(address, actors)
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

    def results(work: Work) -> Iterator[Mapping[str, Any]]:
        return engine.run(work, plan, Predict, (Decode, Classify), decode_apart)

    with output.writing():
        stored = output if groups is None else output.folder(FOLDER)
        parts = list(found.partitions(predictor.localizer, groups, partition_size))
        report = fill(stored, parts, results, Rows.of([]), progress, None if groups is None else groups.table)
        if adapter is not None and parts:
            output.start()
            with connected(address) as ray, quiet(ray):
                fused = dict(fuse_groups(ray, stored, [part.key for part in parts], adapter, output))
            output.finish(list(fused))
            report.shares.update({name: share for name, share in fused.values() if share is not None})
    return report


def _header_predictor(run: str | Path, options: Mapping[str, Any]) -> Predictor:
    """Load the predictor that the header describes, on the CPU, which need not have the precision of the workers."""
    predictor = Predictor.from_pretrained(run, **{**options, "device": "cpu", "precision": "fp32"})
    predictor.network.precision = options.get("precision", "fp32")
    return predictor

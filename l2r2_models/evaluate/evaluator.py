"""Evaluation of every branch and fusion of a run on one split, as `l2r2 evaluate` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..data.table import ImageTable, read_table
from ..errors import L2R2Error
from ..fusion import FUSIONS, INPUTS, Fusion, Grouping, GroupShare, MetadataPrior, create_fusion, with_fallback
from ..fusion.calibration import fit_temperature
from ..fusion.prior_file import read_prior
from ..runs import LOGITS, record_of
from .fit_run import rows_of
from .fuse import fit, fuse
from .logits import BranchLogits, Compute, Progress, branch_logits, compute_logits
from .metrics import confusion_matrix, measure, oracle
from .notes import classes_seen, fitted_on_seen, intervened, left_out, warnings_on
from .risk import risks_at
from .shift import adapt_run, can_fuse
from .zero_shot import strength_on_swapped, with_every_branch, zero_shot_outputs

SHARES = tuple(i / 20 for i in range(1, 21))  # of the images, in `Evaluation.risk`
OWN = "fused: "  # prefix of the name of the run's own fusion
Correct = Callable[[Tensor, ImageTable], Tensor]


@dataclass(frozen=True)
class Judged:
    """Outputs of a run on every image of a split.

    Attributes:
        checkpoint, split: the evaluated checkpoint, and the name of the split.
        fitted_on: the split that temperatures and the other fusions were fitted on, or None.
        labels: class names.
        data: branch logits and ground truth, with the images, and those that could not be used.
        outputs: logits `[N, classes]` of each branch (`full`, `fg`, `bg`; those of full where no object was found), of the run's
            own fusion (`fused: NAME`), of the other fusions, of outputs corrected by a prior, and of ensembles (`full x full`).
        fusions: the other fusions, fitted.
        temperatures: by output, fitted on `fitted_on`; empty without it.
        group: metadata column that rows are grouped by, or None.
        groups: value of `group` per row, or None.
        shares: fraction of misleading backgrounds (see `fuse_groups`) by the groups of `adapt`, else by `groups`, else for the
            split; empty if the fusion has no batch rule.
        warnings: sentences on what makes the metrics too optimistic.
        notes: sentences on what else to know when reading the metrics.
    """

    checkpoint: Checkpoint
    split: str
    fitted_on: str | None
    labels: tuple[str, ...]
    data: BranchLogits
    outputs: dict[str, Tensor]
    fusions: dict[str, Fusion]
    temperatures: dict[str, float]
    group: str | None
    groups: tuple[str, ...] | None
    shares: dict[str, GroupShare]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def own(self) -> list[str]:
        """Names of the run's own outputs: its branches, then its fusion."""
        return [name for name in self.outputs if name in self.data.logits or (name.startswith(OWN) and " + " not in name)]

    @property
    def answer(self) -> str:
        """Name of the output that `predict` returns: the run's fusion, or its only branch."""
        return self.own[-1]

    @property
    def clusters(self) -> Tensor | None:
        """Image index `[N]` per row, for `bootstrap_interval`; None if each row has its own image."""
        rows = self.data.table.rows
        numbers = {path: i for i, path in enumerate(dict.fromkeys(row.path for row in rows))}
        return torch.tensor([numbers[row.path] for row in rows]) if len(numbers) < len(rows) else None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one split: everything that `--json` prints.

    Attributes:
        split: name of the split.
        images, with_object: number of evaluated images, and of those in which an object was found.
        rows: metrics (see `measure`) by output (see `Judged.outputs`).
        oracle: accuracy of always picking a correct branch if there is one.
        labels: class names, in the order of `confusion`.
        confusion: confusion matrices (rows: ground truth, columns: prediction) of the run's own outputs.
        risk: error rates of the run's own outputs among the most confident 5, 10, ..., 100 % of the images.
        group, groups: metadata column that rows are grouped by, and the number of images per value.
        left_out: reasons by image that could not be used.
        fitted_on, temperatures, shares, warnings, notes: see `Judged`.
    """

    split: str
    images: int
    with_object: int
    rows: dict[str, dict[str, Any]]
    oracle: float
    fitted_on: str | None
    temperatures: dict[str, float]
    labels: tuple[str, ...]
    confusion: dict[str, list[list[int]]]
    risk: dict[str, list[float]]
    group: str | None
    groups: dict[str, int]
    shares: dict[str, dict[str, float]]
    left_out: dict[str, str]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def evaluate_run(run: Path | str, data: Path, split: str, **options: Any) -> Evaluation:
    """Compute the metrics of a run on one split; arguments and errors as for `judge_run`."""
    return evaluation_of(judge_run(run, data, split, **options))


def judge_run(
    run: Path | str,
    data: Path,
    split: str,
    *,
    group: str | None = None,
    fit_split: str | None = None,
    prior: str | None = None,
    others: Sequence[Path | str] = (),
    metadata: Path | None = None,
    boxes: Path | None = None,
    skip_bad: bool = False,
    drop_parts: Sequence[int] = (),
    token_quantile: float = 0.0,
    adapt: str = "off",
    workers: int | None = None,
    progress: Progress = lambda batches, _: batches,
    compute: Compute = compute_logits,
) -> Judged:
    """Compute the outputs of each branch and fusion of a run for every image of a split.

    Args:
        run: run folder (the branch logits are stored in it) or Hub id.
        data, metadata, boxes: see `read_table`.
        split: the split to evaluate. Nothing is fitted on it.
        group: metadata column; adds the accuracy by its values and the worst of them.
        fit_split: held-out split to fit every fusion and the temperature of every output on; never `split` itself.
        prior: metadata column; adds each own output corrected by a `MetadataPrior` estimated on the run's training rows. Or a
            JSON file of `l2r2 prior fit`, which is used instead.
        others: more runs with the same labels (e.g. other seeds); adds ensembles, the mean probabilities over the runs of each
            branch and of the fusions.
        skip_bad: leave out images that cannot be used instead of stopping.
        drop_parts, token_quantile: see `IFAM.intervene`.
        adapt: grouping of images, see `Grouping.parse`; adds the run's fusion by group (`fused: NAME, by ADAPT`).
        workers, progress, compute: see `branch_logits`.

    Raises:
        L2R2Error: when the data are unusable, a column is unknown, the labels of the runs differ, or `fit_split` is `split`.
    """
    if fit_split == split:
        raise L2R2Error(f"The split {split} cannot be used both to fit and to evaluate; choose another split to fit on.")
    runs = [with_every_branch(load_checkpoint(source)) for source in (run, *others)]
    if drop_parts or token_quantile:
        for checkpoint in runs:
            try:
                checkpoint.model.intervene(drop_parts, token_quantile)
            except L2R2Error as error:
                raise L2R2Error(f"{checkpoint.name}: {error}") from None
    for other, source in zip(runs[1:], others):
        _check_labels(runs[0], other, source)
    table = read_table(data, metadata=metadata, boxes=boxes)
    splits = {name: rows_of(run, table, name) for name in (split, fit_split) if name}
    for name, rows in splits.items():  # invalid input is reported before the network runs
        _check_classes(runs[0], rows, name)
    if group:
        splits[split].column(group)
    for rows in splits.values() if prior and Path(prior).suffix != ".json" else ():
        rows.column(str(prior))
    correct = _prior(run, table, runs[0].labels, prior) if prior else None
    branches = runs[0].model.branches
    if fit_split and len(branches) < 2:
        raise L2R2Error(f"{run}: has only the branch {', '.join(branches)}, so there is no fusion to fit on {fit_split}.")

    how: dict[str, Any] = dict(workers=workers, progress=progress, compute=compute)

    def logits_of_runs(name: str) -> list[BranchLogits]:
        """Compute the branch logits of each run on a split, over the images that the first run could use."""
        parts: list[BranchLogits] = []
        for checkpoint, source in zip(runs, (run, *others)):
            store = Path(source) / LOGITS if Path(source).is_dir() else None
            usable = parts[0].table if parts else splits[name]
            parts.append(branch_logits(checkpoint, usable, store, skip_bad=skip_bad, **how))
        return parts

    judged, held_out = logits_of_runs(split), logits_of_runs(fit_split) if fit_split else None
    fusions = _fusions(runs[0], judged[0], held_out[0] if held_out else None)
    strength = strength_on_swapped(runs[0], held_out[0].table, held_out[0].table, skip_bad, progress) if held_out else None

    def outputs_on(parts: list[BranchLogits]) -> dict[str, Tensor]:
        baselines = zero_shot_outputs(runs[0], parts[0], strength, **how)
        return {**_outputs(runs, parts, fusions, correct, prior), **baselines}

    outputs = outputs_on(judged)
    grouping = Grouping.parse(adapt)
    adapted = adapt_run(runs[0], judged[0], grouping, group, split)
    if grouping is not None:
        outputs[f"{OWN}{runs[0].model.fusion.name}, by {grouping}"] = adapted.logits
    temperatures = {}
    if held_out:
        fitting = outputs_on(held_out)
        temperatures = {name: fit_temperature(z, held_out[0].labels) for name, z in fitting.items()}
    rows = judged[0].table
    bad = {**judged[0].bad, **(held_out[0].bad if held_out else {})}
    warnings = warnings_on((run, *others), judged[0], split)
    if fit_split:
        warnings += fitted_on_seen((run, *others), splits[fit_split], fit_split)
    evaluated = [(part[0], name) for part, name in ((judged, split), (held_out, fit_split)) if part]
    notes = intervened(runs[0]) + tuple(note for part, name in evaluated for note in left_out(part, str(name)))
    notes += classes_seen(judged[0], runs[0].labels, split)
    shares = {str(place): share for place, share in adapted.shares.items()}
    return Judged(
        runs[0],
        split,
        fit_split,
        tuple(runs[0].labels),
        replace(judged[0], bad=bad),
        outputs,
        fusions,
        temperatures,
        group,
        tuple(rows.column(group)) if group else None,
        shares,
        warnings,
        notes,
    )


def evaluation_of(judged: Judged) -> Evaluation:
    """Compute metrics from stored outputs."""
    data = judged.data
    full = judged.outputs.get("full")
    common: dict[str, Any] = dict(groups=judged.groups, classes=judged.labels, clusters=judged.clusters)
    metrics = {}
    for name, z in judged.outputs.items():
        temperature, than = judged.temperatures.get(name), None if name == "full" else full
        metrics[name] = measure(z, data.labels, data.has_fg, **common, temperature=temperature, than=than)
    matrix = {n: confusion_matrix(judged.outputs[n].argmax(-1), data.labels, len(judged.labels)).tolist() for n in judged.own}
    branches = [judged.outputs[b] for b in data.logits]
    return Evaluation(
        split=judged.split,
        images=len(data),
        with_object=int(data.has_fg.sum()),
        rows=metrics,
        oracle=oracle(branches, data.labels),
        fitted_on=judged.fitted_on,
        temperatures=judged.temperatures,
        labels=judged.labels,
        confusion=matrix,
        risk={n: risks_at(judged.outputs[n], data.labels, SHARES) for n in judged.own},
        group=judged.group,
        groups=dict(sorted(Counter(judged.groups or ()).items())),
        shares={group: asdict(share) for group, share in judged.shares.items()},
        left_out={str(path): reason for path, reason in data.bad.items()},
        warnings=judged.warnings,
        notes=judged.notes,
    )


def _inputs(data: BranchLogits) -> dict[str, tuple[str, ...] | None]:
    """Return the inputs to fuse by suffix of the fusion name: all branches and, if there are three, every pair."""
    pairs = list(combinations([b for b in INPUTS if b in data.logits], 2)) if len(data.logits) > 2 else []
    return {"": None, **{f" ({' + '.join(pair)})": pair for pair in pairs}}


def _fusions(checkpoint: Checkpoint, judged: BranchLogits, held_out: BranchLogits | None) -> dict[str, Fusion]:
    """Return all fusions fitted on the held-out rows or, without these, the fusions without parameters."""
    if held_out is not None:
        every = {more: fit(held_out, sorted(FUSIONS), inputs=inputs) for more, inputs in _inputs(held_out).items()}
        return {name + more: found.fusion for more, fitted in every.items() for name, found in fitted.items()}
    if not can_fuse(judged):
        return {}
    sizes = tuple(judged.logits), len(checkpoint.labels)
    made = {
        name + more: create_fusion({"name": name, "inputs": inputs}, *sizes)
        for more, inputs in _inputs(judged).items()
        for name in sorted(FUSIONS)
    }
    return {name: fusion for name, fusion in made.items() if fusion.count() == 0}


def _outputs(
    runs: Sequence[Checkpoint],
    parts: Sequence[BranchLogits],
    fusions: dict[str, Fusion],
    correct: Correct | None,
    prior: str | None,
) -> dict[str, Tensor]:
    """Return `Judged.outputs`; `parts` are the branch logits of each run for the same images."""
    own = [_own_outputs(checkpoint, part) for checkpoint, part in zip(runs, parts)]
    outputs = dict(own[0])
    if can_fuse(parts[0]):
        outputs.update((name, fuse(fusion, parts[0])) for name, fusion in fusions.items())
    if correct:
        outputs.update({f"{name} + {Path(str(prior)).stem}": correct(z, parts[0].table) for name, z in own[0].items()})
    if len(runs) > 1:
        outputs.update(_ensembles(own, [checkpoint.labels for checkpoint in runs]))
    return outputs


def _ensembles(own: Sequence[dict[str, Tensor]], labels: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Return log mean probabilities of the outputs that all runs have, e.g. `fg x fg` (`docs/method.md`, section 4)."""
    by_run = [{"fused" if name.startswith(OWN) else name: z.double() for name, z in one.items()} for one in own]
    order = [[list(names).index(label) for label in labels[0]] for names in labels]
    found = {}
    for name in by_run[0]:
        if all(name in one for one in by_run):
            mean = torch.stack([one[name].softmax(-1)[:, columns] for one, columns in zip(by_run, order)]).mean(0)
            found[" x ".join([name] * len(by_run))] = mean.clamp(min=torch.finfo(mean.dtype).tiny).log().float()
    return found


def _own_outputs(checkpoint: Checkpoint, data: BranchLogits) -> dict[str, Tensor]:
    """Return the own outputs of a run: its branches, and its fusion if it has one."""
    outputs = with_fallback(data.logits, data.has_fg)  # the same fallback as in a Prediction
    if can_fuse(data):
        outputs[f"{OWN}{checkpoint.model.fusion.name}"] = fuse(checkpoint.model.fusion, data)
    return outputs


def _check_labels(first: Checkpoint, other: Checkpoint, source: Path | str) -> None:
    if differing := sorted(set(first.labels) ^ set(other.labels)):
        raise L2R2Error(
            f"{source}: its classes differ from those of {first.name} (only one of them has {', '.join(differing[:5])}); "
            "an ensemble needs runs of the same classes."
        )


def _check_classes(checkpoint: Checkpoint, rows: ImageTable, split: str) -> None:
    unknown = Counter(str(row.label) for row in rows.rows if row.label and row.label not in checkpoint.labels)
    if unknown:
        names = ", ".join(f"{name} ({count})" for name, count in unknown.most_common(5))
        raise L2R2Error(
            f"{rows.root}: {sum(unknown.values())} of the {len(rows)} images of {split} have classes that {checkpoint.name} was "
            f"not trained on: {names}; take them out of the split, or train with these classes."
        )


def _prior(run: Path | str, table: ImageTable, labels: Sequence[str], prior: str) -> Correct:
    """Read a prior from a file, or count a column of the training rows."""
    if Path(prior).suffix == ".json":
        read = read_prior(Path(prior), labels)
        return lambda logits, judged: read(logits, [dict(row.columns) for row in judged.rows])
    rows = table.of_names(record_of(run).get("train_files", []))
    if not len(rows):
        raise L2R2Error(f"{table.root}: contains none of the images that {run} was trained on, so a prior cannot be estimated.")
    if other := next((row for row in rows.rows if row.label not in labels), None):
        raise L2R2Error(f"{other.path}: its class {other.label} is unknown to {run}; pass the data that the run was trained on.")
    rows.column(prior)
    truth, values = [str(row.label) for row in rows.rows], [dict(row.columns) for row in rows.rows]
    counted = MetadataPrior.of_rows(labels, truth, values, [prior])
    return lambda logits, judged: counted(logits, [dict(row.columns) for row in judged.rows])

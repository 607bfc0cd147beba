"""Fit fusions on a split, choose one, and save it into the checkpoint of the run, as `l2r2 fuse` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..checkpoints.format import WEIGHTS
from ..checkpoints.fusion_file import write_fusion
from ..checkpoints.zero_shot import is_zero_shot
from ..data.table import ImageTable, read_table
from ..errors import L2R2Error
from ..fusion import FUSIONS, Fusion, fit_batch
from ..io import file_sha256, write_json
from ..locks import only_writer
from ..runs import LOGITS, RUN, changed_weights, record_of
from .backgrounds import backgrounds_in, default_backgrounds, logits_to_fit
from .cascade import CascadeFit, check_request, fit_cascade
from .choose import choose, lead_alone, lead_of, references
from .fuse import BEST, PLAIN, SWAPPED, Column, Fitted, fit, is_swapped, observations
from .logits import BranchLogits, Progress
from .risk import Abstention, fit_abstention

WORSE = 0.03  # increase in ECE from plain to swapped rows above which to warn


@dataclass(frozen=True)
class FuseReport:
    """Result of fitting the fusions of a run.

    Attributes:
        chosen: name of the fusion that was fitted and saved.
        config: its config.
        reason: why it was chosen, in one sentence; empty if it was named by the caller.
        table: metrics (`accuracy`, `ece`, `nll`) by name and column (`plain`, `swapped`) on held-out folds of the split (see
            `Fitted`), for each branch alone, the average, and each fusion.
        numbers: number of fitted parameters by fusion.
        backgrounds: backgrounds of the rows: `plain`, `swapped` or `both`.
        rows: number of rows; an object on three backgrounds counts as three.
        with_object: number of rows with an object, which are the ones fitted on.
        warnings: what makes the metrics too optimistic, in sentences.
        left_out: reasons by image that could not be used.
        abstain: the confidence threshold for a stated risk; None if none was asked for.
        cascade: the confidence from which fg decides alone, for a stated loss of accuracy; None if none was asked for.
    """

    chosen: str
    config: dict[str, Any]
    reason: str
    table: dict[str, dict[str, dict[str, float]]]
    numbers: dict[str, int]
    backgrounds: str
    rows: int
    with_object: int
    warnings: tuple[str, ...]
    left_out: dict[str, str]
    abstain: Abstention | None = None
    cascade: CascadeFit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


ONE_KIND = {
    "plain": "fitted on unchanged backgrounds only: the fusion may trust them elsewhere too; leave out --val-backgrounds.",
    "swapped": "fitted on other backgrounds only: the fusion may ignore the usual ones; leave out --val-backgrounds.",
}


def fit_run(
    run: Path | str,
    data: Path,
    split: str,
    *,
    method: str | None = None,
    class_wise: bool = False,
    backgrounds: str | None = None,
    scenes: Path | None = None,
    group: str | None = None,
    inputs: Sequence[str] | None = None,
    metric: str = "accuracy",
    metadata: Path | None = None,
    boxes: Path | None = None,
    skip_bad: bool = False,
    abstain_risk: float | None = None,
    out: Path | None = None,
    cascade: float | None = None,
    save: bool = True,
    progress: Progress = lambda batches, _: batches,
) -> FuseReport:
    """Fit the fusions on one split and save the chosen one into the run.

    Args:
        run: run folder, in which the branch logits are stored too; or a zero-shot model (`vlm:MODEL?names=FILE`).
        data, metadata, boxes: see `read_table`.
        split: the split to fit on, see `rows_of`.
        method: name of a fusion, or `best_on_val` (default) for the one that `choose` selects.
        class_wise, group, metric: see `fit`.
        inputs: the branches to fuse; defaults to those of the run's current fusion.
        backgrounds: `plain`, `swapped` or `both`, see `logits_to_fit`; defaults to `both` if objects have boxes or masks, else
            `plain`. The training images of the run provide the backgrounds.
        scenes: folder of images that provide the backgrounds instead, see `backgrounds_in`.
        skip_bad: leave unreadable images out instead of stopping.
        abstain_risk: also fit the confidence below which predictions are withheld to reach this error rate, see `fit_abstention`.
        out: file for the fusion of a zero-shot model, which has no run folder; it is used as `vlm:MODEL?fusion=FILE`.
        cascade: also fit the confidence from which fg decides alone, losing at most this accuracy, see `fit_cascade`.
        save: write the checkpoint, or `out`.
        progress: wraps the batches while logits are computed.

    Raises:
        L2R2Error: when the method is unknown, or the run or the split is unusable.
    """
    method = method or BEST
    if method not in (BEST, *FUSIONS):
        raise L2R2Error(f'Unknown fusion "{method}"; choose from {", ".join([BEST, *sorted(FUSIONS)])}.')
    zero_shot = is_zero_shot(str(run))
    _check_place(run, zero_shot, out, save, abstain_risk=abstain_risk, cascade=cascade)
    checkpoint = load_checkpoint(run, any_fusion=True)
    if cascade is not None:
        check_request(checkpoint.model, cascade)
    if save and not zero_shot and changed_weights(Path(run), checkpoint.digest):
        raise L2R2Error(f"{run}: the weights have changed since training (their SHA-256 differs from run.json); train it again.")
    everything = read_table(data, metadata=metadata, boxes=boxes)
    table = rows_of(run, everything, split)
    trained = everything.of_names(record_of(run).get("train_files", []))
    donors = backgrounds_in(scenes) if scenes else trained if len(trained) else table
    possible = default_backgrounds(table, donors, checkpoint.box_threshold, whole=scenes is not None)
    backgrounds = backgrounds or possible
    store = None if zero_shot else Path(run) / LOGITS
    logits = logits_to_fit(
        checkpoint, table, donors, backgrounds, store, whole=scenes is not None, skip_bad=skip_bad, progress=progress
    )
    inputs = checkpoint.model.fusion.over if inputs is None else inputs
    counts = _counts(trained, checkpoint.labels)
    names = None if method == BEST else [method]
    fitted = fit(logits, names, class_wise, group, inputs=inputs, metric=metric, train_counts=counts)
    compared, alone = references(logits, group, metric), lead_alone(logits, inputs, group, metric)
    choice = choose({**fitted, **alone}, compared, lead_of(logits, inputs)) if method == BEST else None
    chosen = choice.name if choice else method
    fusion = checkpoint.model.fusion = {**fitted, **alone}[chosen].fusion
    fusion.batch = _batch_rule(fusion, logits, counts)
    abstain = None if abstain_risk is None else _abstention({**fitted, **alone}[chosen], logits, abstain_risk)
    decides = None if cascade is None else fit_cascade({**fitted, **alone}[chosen].logits, logits, cascade, metric)
    every = {**compared, **{name: f.columns for name, f in fitted.items()}}
    seen = trained_on(run, table, split)
    warnings = [f"{seen}; the metrics are too optimistic, and so is the fitted fusion."] if seen else []
    warnings += [ONE_KIND[backgrounds]] if possible == "both" != backgrounds else []
    report = FuseReport(
        chosen,
        fusion.config(),
        choice.reason if choice else "",
        {name: {c: {"accuracy": m.accuracy, "ece": m.ece, "nll": m.nll} for c, m in by.items()} for name, by in every.items()},
        {name: f.fusion.count() for name, f in fitted.items()},
        backgrounds,
        len(logits),
        int(logits.has_fg.sum()),
        (*warnings, *_less_calibrated(every, chosen, lead_of(logits, inputs))),
        {str(path): why for path, why in logits.bad.items()},
        abstain,
        decides,
    )
    if save and out is not None:
        write_fusion(out, fusion, checkpoint.model.branches, checkpoint.labels)
    elif save:
        reached = {**fitted, **alone}[chosen].accuracy
        fit_record = {
            "split": split,
            "backgrounds": backgrounds,
            "group": group,
            "rows": len(logits),
            "method": method,
            metric: reached,
            **({} if abstain is None else {"abstain": abstain.to_dict()}),
            **({} if decides is None else {"cascade": decides.to_dict()}),
        }
        used = table.names() if method == BEST or fusion.count() else []
        _save(Path(run), checkpoint, {**checkpoint.training, "fusion_fit": fit_record}, used)
    return report


def _check_place(run: Path | str, zero_shot: bool, out: Path | None, save: bool, **thresholds: float | None) -> None:
    """Check that there is a place for the fusion: the run folder, or a file if the model is zero-shot."""
    if not zero_shot and not Path(run).is_dir():
        raise L2R2Error(f"{run}: no such run folder; a fusion can only be saved into a local run.")
    if zero_shot and save and (out is None or out.suffix != ".safetensors"):
        raise L2R2Error(f"{run}: pass -o FILE.safetensors for the fusion of a zero-shot model, which has no run folder.")
    for option, value in thresholds.items():
        if zero_shot and value is not None:
            name = option.replace("_", "-")
            raise L2R2Error(f"{run}: a threshold for --{name} can only be saved into a run, and this model has none.")
    if out is not None and not zero_shot:
        raise L2R2Error(f"{run}: its fusion is saved in the run; leave out -o.")


def _counts(trained: ImageTable, labels: Sequence[str]) -> Tensor | None:
    """Return the number of training rows per class `[classes]`; None if there are none."""
    counts = trained.label_counts()
    return torch.tensor([float(counts[label]) for label in labels]) if any(counts[label] for label in labels) else None


def _batch_rule(fusion: Fusion, data: BranchLogits, counts: Tensor | None) -> Fusion | None:
    """Fit the batch rule that `--adapt` uses, see `fuse_groups`."""
    rows = data.select(data.has_fg)
    counts = rows.labels.bincount(minlength=rows.classes) if counts is None else counts
    return fit_batch(fusion, rows.logits, rows.labels, observations(rows), is_swapped(rows), counts)


def _abstention(fitted: Fitted, data: BranchLogits, risk: float) -> Abstention:
    """Fit the threshold on unchanged images, with and without an object; if there are none, on those on other backgrounds."""
    rows = ~is_swapped(data)
    rows = rows if rows.any() else ~rows
    return fit_abstention(fitted.logits[rows], data.labels[rows], risk)


def _less_calibrated(every: Mapping[str, Mapping[str, Column]], chosen: str, lead: str) -> list[str]:
    """Warn if the chosen fusion is less well calibrated on swapped backgrounds than on the original ones."""
    columns = every.get(chosen, every[lead])
    if {PLAIN, SWAPPED} <= set(columns) and columns[SWAPPED].ece > columns[PLAIN].ece + WORSE:
        plain, swapped = (100 * columns[c].ece for c in (PLAIN, SWAPPED))
        return [
            f"calibration gets worse where backgrounds change: the ECE of {chosen} is {plain:.1f} on plain rows and "
            f"{swapped:.1f} on swapped ones."
        ]
    return []


def _save(run: Path, checkpoint: Checkpoint, training: dict[str, Any], used: Sequence[str]) -> None:
    """Write the fitted fusion; if interrupted, run.json still lists the SHA-256 of the weights on disk."""
    with only_writer(run):
        if file_sha256(run / WEIGHTS) != checkpoint.digest:
            raise L2R2Error(f"{run}: its weights were changed while the fusion was fitted; fit it again.")
        record = record_of(run)

        def write_record(known: Any) -> None:
            if record:  # written before the weights, so that an interruption never hides that the split was fitted on
                write_json(run / RUN, {**record, "fit_files": list(used), "weights_sha256": known})

        def before(digest: str) -> None:
            write_record([checkpoint.digest, digest])

        localizer, labels = checkpoint.localizer, checkpoint.labels
        write_record(save_checkpoint(checkpoint.model, run, labels, training, localizer=localizer, before=before))


def rows_of(run: Path | str, table: ImageTable, split: str) -> ImageTable:
    """Return the rows of a split.

    If the table has no split `val`, `val` means the rows that the run held out of training (`finetune --val-fraction`).

    Raises:
        L2R2Error: when the split has no rows, or the table lacks some of the held-out images.
    """
    held_out = record_of(run).get("val_files", [])
    if split == "val" and split not in table.splits and held_out:
        rows = table.of_names(held_out)
        if lacking := set(held_out) - set(rows.names()):
            raise L2R2Error(f"{table.root}: {len(lacking)} of the images that {run} held out are missing; pass its data.")
        return rows
    return table.of_split(split)


def warnings_of(run: Path | str, table: ImageTable, split: str, consequence: str) -> tuple[str, ...]:
    """Warn of evaluation rows used to train the run, to choose its epoch, or to fit its fusion."""
    record = record_of(run)
    chosen_by = record.get("val_files", []) if record.get("val_used_for") else []
    found = [
        trained_on(run, table, split),
        _seen(table, split, chosen_by, "used to choose the epoch"),
        _seen(table, split, record.get("fit_files", []), "used to fit the fusion"),
    ]
    return tuple(f"{seen}; the metrics are too optimistic and {consequence}." for seen in found if seen)


def trained_on(run: Path | str, table: ImageTable, split: str) -> str:
    """Return a clause that counts the rows used to train the run or the run it started from; empty if there are none."""
    record = record_of(run)
    return _seen(table, split, [*record.get("train_files", []), *record.get("init_files", [])], "trained on")


def _seen(table: ImageTable, split: str, files: list[str], what: str) -> str:
    names = set(table.names())
    count = len(names & set(files))
    return f"{count} of the {len(names)} images of {split} were {what}" if count else ""

"""`l2r2 evaluate` without its printing: every branch and every fusion of a run on one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.dataset import ImageTable, read_table
from ..errors import L2R2Error
from ..fusion import FUSIONS, MetadataPrior, create_fusion
from ..hub import load_checkpoint
from .fit_run import LOGITS, record_of, rows_of, warnings_of
from .fuse import fit, fuse
from .logits import Progress, branch_logits
from .metrics import measure, oracle


@dataclass(frozen=True)
class Evaluation:
    """Figures of one split.

    Attributes:
        split, images, with_object: what was judged.
        rows: figures (see `measure`) of each branch (`full`, `fg`, `bg`), of the run's own fusion (`fused: NAME`), and of the
            others: those that need no fitting, or all, if a split to fit on was given.
        oracle: accuracy if one could always pick a branch that is right.
        fitted_on: the split that the other fusions were fitted on, or None.
        warnings: sentences about rows that were trained or fitted on, and about missing boxes.
    """

    split: str
    images: int
    with_object: int
    rows: dict[str, dict[str, Any]]
    oracle: float
    fitted_on: str | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_run(
    run: Path | str,
    data: Path,
    split: str,
    *,
    group: str | None = None,
    fit_split: str | None = None,
    prior: str | None = None,
    metadata: Path | None = None,
    boxes: Path | None = None,
    progress: Progress = lambda batches, _: batches,
) -> Evaluation:
    """Judge a run on one split.

    Args:
        run: a run's folder (the branch logits are stored in it) or a Hub id.
        data, metadata, boxes: see `read_table`.
        split: the rows to judge by.
        group: a metadata column; adds the accuracy by its values and the worst of them.
        fit_split: held-out rows to fit every fusion on; never `split` itself.
        prior: a metadata column; adds each branch and the run's fusion corrected by `MetadataPrior` with the run's training rows.
        progress: wraps the batches while logits are computed.

    Raises:
        L2R2Error: unusable data, an unknown column, or `fit_split` that is the split to judge by.
    """
    if fit_split == split:
        raise L2R2Error(f"The split {split} cannot be both fitted on and judged by.")
    checkpoint = load_checkpoint(run)
    table = read_table(data, metadata=metadata, boxes=boxes)
    store = Path(run) / LOGITS if Path(run).is_dir() else None
    judged = branch_logits(checkpoint, rows_of(run, table, split), store, progress=progress)
    groups = judged.table.column(group) if group else None

    if fit_split and not ("fg" in judged.logits and len(judged.logits) > 1):
        raise L2R2Error(f"{run}: has only the branch {', '.join(judged.logits)}, so there is no fusion to fit on {fit_split}.")
    outputs = dict(judged.logits)
    if "fg" in judged.logits and len(judged.logits) > 1:
        if "full" in judged.logits:  # where no object was found the full branch answers, as in a Prediction
            outputs["fg"] = judged.logits["fg"].where(judged.has_fg[:, None], judged.logits["full"])
        outputs[f"fused: {checkpoint.model.fusion.name}"] = fuse(checkpoint.model.fusion, judged)
        made = [create_fusion(name, len(judged.logits), len(checkpoint.labels)) for name in FUSIONS]
        fusions = {fusion.name: fusion for fusion in made if fusion.count() == 0}
        if fit_split:
            held_out = branch_logits(checkpoint, rows_of(run, table, fit_split), store, progress=progress)
            fusions = {name: f.fusion for name, f in fit(held_out).items()}
        outputs.update((name, fuse(fusion, judged)) for name, fusion in sorted(fusions.items()))
    if prior:
        correct = _prior(run, table, checkpoint.labels, prior)
        corrected = [n for n in outputs if n in judged.logits or n.startswith("fused: ")]
        outputs.update({f"{name} + {prior}": correct(outputs[name], judged.table.column(prior)) for name in corrected})
    figures = {name: measure(z, judged.labels, judged.has_fg, groups) for name, z in outputs.items()}
    found = int(judged.has_fg.sum())
    branches = [outputs[b] for b in judged.logits]
    warnings = warnings_of(run, judged.table, split, "say nothing about new images")
    if not found and "fg" in judged.logits:
        warnings += (f"no object was found in any image of {split}; give --boxes if the boxes are in a file.",)
    return Evaluation(split, len(judged), found, figures, oracle(branches, judged.labels), fit_split, warnings)



def _prior(run: Path | str, table: ImageTable, labels: Sequence[str], column: str) -> MetadataPrior:
    rows = table.of_names(record_of(run).get("train_files", []))
    if not len(rows):
        raise L2R2Error(f"{table.root}: holds none of the images that {run} was trained on, so a prior cannot be counted.")
    index = {label: i for i, label in enumerate(labels)}
    known = torch.tensor([index[str(row.label)] for row in rows.rows])
    return MetadataPrior(known, rows.column(column), len(labels))

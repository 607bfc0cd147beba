"""Branch logits of a data set, computed once and stored, so that fusions can be fitted without the network."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..data.dataset import ViewDataset
from ..data.table import ImageTable, rows_digest
from ..errors import L2R2Error
from ..hardware import rows_per_pass
from ..io import check_readable, write_atomic
from ..models.l2r2 import L2R2
from ..pipe import in_order
from ..views import stack_views

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], int], Iterable[Any]]
Compute = Callable[[L2R2, ViewDataset, int, bool, int | None, Progress], dict[str, Tensor]]


@dataclass(frozen=True)
class BranchLogits:
    """Branch logits for the rows of a table, in its order.

    Attributes:
        logits: `[N, classes]` float32 by branch.
        has_fg: `[N]` bool, True where an object was found.
        labels: `[N]` int64 class indices.
        table: the rows.
        objectness: `[N]` box scores, 1 where there is none; None for 1 everywhere.
        bad: reasons by image that could not be used and was left out.
    """

    logits: dict[str, Tensor]
    has_fg: Tensor
    labels: Tensor
    table: ImageTable
    objectness: Tensor | None = None
    bad: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return next(iter(self.logits.values())).shape[1]

    def select(self, keep: Tensor) -> BranchLogits:
        """Return the rows where `keep` (`[N]` bool) is True."""
        rows = keep.nonzero()[:, 0]
        table = replace(self.table, rows=tuple(self.table.rows[i] for i in rows.tolist()))
        scores = None if self.objectness is None else self.objectness[rows]
        return BranchLogits({b: z[rows] for b, z in self.logits.items()}, self.has_fg[rows], self.labels[rows], table, scores)


def compute_logits(
    model: L2R2, items: ViewDataset, batch_size: int, skip_bad: bool, workers: int | None, progress: Progress
) -> dict[str, Tensor]:
    """Compute the logits by branch, `has_fg`, `objectness`, and `used`, the row indices of the usable images.

    Args:
        model: the model, which is moved to the GPU if there is one, and back.
        items: the rows, without augmentation.
        batch_size, skip_bad, workers, progress: see `branch_logits`.

    Raises:
        L2R2Error: when an image cannot be used, without `skip_bad`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    found: dict[str, list[Tensor]] = {branch: [torch.empty(0, model.num_classes)] for branch in model.branches}
    found |= {"has_fg": [torch.empty(0, dtype=torch.bool)], "objectness": [torch.empty(0)]}
    found["used"] = [torch.empty(0, dtype=torch.int64)]
    batches = [list(range(i, min(i + batch_size, len(items)))) for i in range(0, len(items), batch_size)]

    def load(i: int) -> dict[str, Any] | None:
        try:
            return items[i]
        except L2R2Error as error:
            if not skip_bad:
                raise _stop(error) from error
            return None

    cut = in_order(load, range(len(items)), workers, ahead=batch_size)
    for batch in progress(batches, len(batches)):
        loaded = {i: item for i, item in zip(batch, cut) if item is not None}
        if not loaded:
            continue
        names = [name for name in next(iter(loaded.values())) if name not in ("labels", "objectness")]
        rows = list(loaded.values())
        size = rows_per_pass(device, len(rows), len(model.branches))
        for start in range(0, len(rows), size):
            views = {name: stack_views([row[name] for row in rows[start : start + size]]).to(device) for name in names}
            with torch.inference_mode():
                out = model.forward_views(**views)
            for branch, value in out.branches().items():
                found[branch].append(value.float().cpu())
            found["has_fg"].append(out.has_fg.cpu())
        found["objectness"].append(torch.tensor([item["objectness"] for item in loaded.values()]))
        found["used"].append(torch.tensor(list(loaded)))
    model.cpu()
    # copies outside inference mode, so that fusions can be fitted on them
    return {name: torch.cat(parts).clone() for name, parts in found.items()}


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join what `compute_logits` returned for several parts of a table."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def branch_logits(
    checkpoint: Checkpoint,
    table: ImageTable,
    store: Path | None = None,
    *,
    batch_size: int = 32,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Progress = lambda batches, _: batches,
    compute: Compute = compute_logits,
) -> BranchLogits:
    """Load the branch logits of a table from the store, or compute them.

    Args:
        checkpoint: the model.
        table: images with labels of the model's classes; their best box is used.
        store: folder for the logits, one file per model and table; None to not store them.
        batch_size: images per forward pass.
        skip_bad: leave out images that cannot be used (unreadable, or boxes for another size) instead of stopping.
        workers: number of threads that decode images and cut views in advance; 0 for none, by default one per core.
        progress: wraps the batches.
        compute: computes the logits, e.g. `scale.logits_on_ray()`.

    Raises:
        L2R2Error: when an image cannot be used (without `skip_bad`), none can, a label is unknown, or logits are not finite.
    """
    model, threshold = checkpoint.model, checkpoint.box_threshold
    items = ViewDataset(table, checkpoint.labels, model.view_spec, model.branches, box_threshold=threshold, objectness=True)
    # the fusion is not part of the key: logits stay valid when it is fitted again
    about = [model.view_spec.to_dict(), threshold, list(checkpoint.labels), rows_digest(table, times=True)]
    about += [done] if (done := model.interventions()) else []
    key = json.dumps([_branches_digest(model), *about])
    file = None if store is None else store / f"{_short(key)}.safetensors"
    stored = None if file is None else _read(file, key, len(table), model)
    faults = {} if stored is None else _faults(items, stored)
    if stored is None or not all(faults.values()):  # an image that was unreadable at the time is readable now
        stored = compute(model, items, batch_size, skip_bad, workers, progress)
        if not len(stored["used"]):
            raise L2R2Error(f"None of the {len(items)} images can be used. The first one: {_fault(items, 0)}")
        finite = torch.stack([stored[b].isfinite().all(1) for b in model.branches]).all(0)
        if wrong := [table.rows[i].path for i in stored["used"][~finite].tolist()]:
            where = f"for {len(wrong)} of {len(finite)} images, e.g. {wrong[0]}"
            raise L2R2Error(f"{checkpoint.name}: the logits are not finite {where}; its training has diverged.")
        if file is not None:
            _write(file, key, stored)
        faults = _faults(items, stored)
    if faults and not skip_bad:
        raise _stop(next(iter(faults.values())))
    rows = replace(table, rows=tuple(table.rows[i] for i in stored["used"].tolist()))
    labels = torch.tensor(items.targets)[stored["used"]]
    bad = {table.rows[i].path: fault for i, fault in faults.items()}
    logits = {b: stored[b] for b in model.branches}
    return BranchLogits(logits, stored["has_fg"].bool(), labels, rows, stored["objectness"], bad)


def _stop(reason: L2R2Error | str) -> L2R2Error:
    return L2R2Error(f"{reason} Fix it, or pass --skip-bad to leave such images out.")


def _fault(items: ViewDataset, i: int) -> str:
    """Return why an image cannot be used; empty if it can."""
    try:
        items[i]
    except L2R2Error as error:
        return str(error)
    return ""


def _faults(items: ViewDataset, stored: dict[str, Tensor]) -> dict[int, str]:
    used = set(stored["used"].tolist())
    return {i: _fault(items, i) for i in range(len(items)) if i not in used}


def _write(file: Path, key: str, stored: dict[str, Tensor]) -> None:
    tensors = {**stored, "has_fg": stored["has_fg"].to(torch.uint8)}
    try:
        write_atomic(file, lambda path: save_file(tensors, path, {"key": key}))
    except L2R2Error as error:  # the store is only a cache: a read-only run can still be evaluated
        logger.warning("%s", error)


def _read(file: Path, key: str, rows: int, model: L2R2) -> dict[str, Tensor] | None:
    """Read the stored tensors for a key; None if they are missing or invalid, so that they are computed again."""
    try:
        check_readable(file, most=None)
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            tensors = {name: stored.get_tensor(name) for name in (*model.branches, "has_fg", "objectness", "used")}
    except (SafetensorError, OSError, L2R2Error):
        return None
    used = tensors["used"]
    fits = used.ndim == 1 and bool((used.diff() > 0).all()) and len(used) > 0 and bool(used[0] >= 0) and bool(used[-1] < rows)
    shapes = [tensors[b].shape == (len(used), model.num_classes) and bool(tensors[b].isfinite().all()) for b in model.branches]
    shapes += [tensors[name].shape == used.shape for name in ("has_fg", "objectness")]
    return tensors if fits and all(shapes) else None


def _branches_digest(model: L2R2) -> str:
    """Return the SHA-256 of all weights except those of the fusion."""
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("fusion.")}
    return hashlib.sha256(save(weights)).hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

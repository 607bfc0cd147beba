"""Branch logits of a data set, computed once and stored, so that fusions are fitted and compared without the network."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from ..data.dataset import ImageTable, ViewDataset, rows_digest
from ..errors import L2R2Error
from ..files import write_atomic
from ..hub import Checkpoint
from ..model import L2R2

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[list[int]], int], Iterable[list[int]]]


@dataclass(frozen=True)
class BranchLogits:
    """What the branches say of every image of a table, in its order.

    Attributes:
        logits: `[N, classes]` float32 by branch.
        has_fg: `[N]` bool, whether an object was found.
        labels: `[N]` int64.
        table: the images.
    """

    logits: dict[str, Tensor]
    has_fg: Tensor
    labels: Tensor
    table: ImageTable

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def context(self) -> Tensor:
        """`[K, N, classes]` of the branches other than fg, full first."""
        return torch.stack([self.logits[b] for b in ("full", "bg") if b in self.logits])

    def select(self, keep: Tensor) -> BranchLogits:
        """The rows where `keep` (`[N]` bool) is True."""
        rows = keep.nonzero()[:, 0]
        table = replace(self.table, rows=tuple(self.table.rows[i] for i in rows.tolist()))
        return BranchLogits({b: z[rows] for b, z in self.logits.items()}, self.has_fg[rows], self.labels[rows], table)


def branch_logits(
    checkpoint: Checkpoint,
    table: ImageTable,
    store: Path | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = lambda batches, _: batches,
) -> BranchLogits:
    """The branch logits of a table, from the store if it has them, else from the network.

    Args:
        checkpoint: the model.
        table: images with labels of the model's classes; their best box is used.
        store: folder for the logits, one file a model and table; None does not store.
        batch_size: images in one pass.
        progress: wraps the batches.

    Raises:
        L2R2Error: an unreadable image, or a label that the model does not know.
    """
    model, threshold = checkpoint.model, checkpoint.box_threshold
    items = ViewDataset(table, checkpoint.labels, model.view_spec, model.branches, box_threshold=threshold)
    # the fusion is not part of the key: logits stay valid when it is fitted anew
    about = [model.view_spec.to_dict(), threshold, list(checkpoint.labels), rows_digest(table, times=True)]
    key = json.dumps([_branches_digest(model), *about])
    file = None if store is None else store / f"{_short(key)}.safetensors"
    if file is not None and (stored := _read(file, key, len(table), model)) is not None:
        return BranchLogits({b: stored[b] for b in model.branches}, stored["has_fg"].bool(), stored["labels"], table)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    found: dict[str, list[Tensor]] = {}
    batches = [list(range(i, min(i + batch_size, len(items)))) for i in range(0, len(items), batch_size)]
    for batch in progress(batches, len(batches)):
        loaded = [items[i] for i in batch]
        views = {b: torch.stack([item[b] for item in loaded]).to(device) for b in model.branches}
        with torch.inference_mode():
            out = {**model.forward_branches(**views), "has_fg": torch.stack([item["has_fg"] for item in loaded])}
        for name, value in out.items():
            found.setdefault(name, []).append(value if name == "has_fg" else value.float().cpu())
    model.cpu()
    joined = {name: torch.cat(parts).clone() for name, parts in found.items()}  # out of inference mode, to be fitted on
    labels = torch.tensor(items.targets)
    if not all(joined[b].isfinite().all() for b in model.branches):
        raise L2R2Error(f"{checkpoint.name}: gives logits that are not finite; its training has diverged.")
    if file is not None:
        tensors = {**joined, "has_fg": joined["has_fg"].to(torch.uint8), "labels": labels}
        try:
            write_atomic(file, lambda path: save_file(tensors, path, {"key": key}))
        except L2R2Error as error:  # a store is a convenience: a run that cannot be written to can still be judged
            logger.warning("%s", error)
    return BranchLogits({b: joined[b] for b in model.branches}, joined["has_fg"], labels, table)


def _read(file: Path, key: str, rows: int, model: L2R2) -> dict[str, Tensor] | None:
    """What the store has for a key; nothing where there is any doubt, so that it is computed anew."""
    try:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return None
            tensors = {name: stored.get_tensor(name) for name in (*model.branches, "has_fg", "labels")}
    except (SafetensorError, OSError):
        return None
    shapes = [tensors[b].shape == (rows, model.num_classes) and bool(tensors[b].isfinite().all()) for b in model.branches]
    return tensors if all(shapes) and len(tensors["has_fg"]) == len(tensors["labels"]) == rows else None


def _branches_digest(model: L2R2) -> str:
    """SHA-256 over the weights that make the branch logits: all but the fusion's."""
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("fusion.")}
    return hashlib.sha256(save(weights)).hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

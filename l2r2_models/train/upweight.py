"""JTT ("just train twice"): draw the training rows that an earlier run misclassifies more often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..data.dataset import ViewDataset
from ..data.loader import collate
from ..data.table import ImageTable
from ..errors import L2R2Error

VIEWS = ("full", "fg", "bg", "mask", "has_fg", "objectness")  # of an item, for `forward_views`
FACTOR = 20


@dataclass(frozen=True)
class FirstStage:
    """The run whose errors are drawn more often. Source: Liu et al., "Just Train Twice" (arXiv 2107.09044).

    Attributes:
        checkpoint: the run.
        factor: how often a misclassified row is drawn per epoch.
    """

    checkpoint: Checkpoint
    factor: int

    @classmethod
    def read(cls, name: str, factor: int | None, classes: Sequence[str]) -> FirstStage:
        """Load the run; `factor` is 20 by default.

        Raises:
            L2R2Error: when it cannot be loaded, or was trained on other classes.
        """
        checkpoint = load_checkpoint(name)
        if sorted(checkpoint.labels) != sorted(classes):
            raise L2R2Error(f"{name}: was trained on other classes; give jtt a run that was trained on these images.")
        return cls(checkpoint, FACTOR if factor is None else factor)

    def about(self) -> dict[str, Any]:
        """Return what a run records about its first stage."""
        return {"name": Path(self.checkpoint.name).name, "digest": self.checkpoint.digest}

    @torch.inference_mode()
    def errors(
        self, table: ImageTable, batch_size: int, workers: int, progress: Callable[[Iterable[None], int], Iterable[None]]
    ) -> list[bool]:
        """Return whether the fused prediction of each row is wrong; views are cut without augmentation."""
        model, labels = self.checkpoint.model, self.checkpoint.labels
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        threshold = self.checkpoint.box_threshold
        items = ViewDataset(table, labels, model.view_spec, model.branches, box_threshold=threshold, objectness=True)
        wrong: list[bool] = []

        def predict() -> Iterable[None]:
            for item in DataLoader(items, batch_size, num_workers=workers, collate_fn=collate):
                out = model.forward_views(**{name: item[name].to(device) for name in VIEWS if name in item})
                wrong.extend((out.fused.argmax(1).cpu() != item["labels"]).tolist())
                yield

        for _ in progress(predict(), -(-len(items) // batch_size)):
            pass
        model.cpu()
        return wrong

    def upweighted(self, table: ImageTable, wrong: Sequence[bool]) -> ImageTable:
        """Return the rows with the wrong ones repeated, so that an epoch has `factor` of each."""
        again = tuple(row for row, error in zip(table.rows, wrong) if error)
        return replace(table, rows=table.rows + again * (self.factor - 1))

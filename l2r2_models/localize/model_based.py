"""What the localizers that look with a checkpoint's own network share: the model, and views that are mapped back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from ..boxes.detections import Detections, ViewMap
from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..views import ViewSpec, make_views, view_map
from .base import Context, Localizer, Spec, size_of


class Looking(Localizer):
    """A localizer with a checkpoint: the source, or without one the checkpoint it was made for."""

    source = "a run or a Hub id"

    def __init__(self, spec: Spec, context: Context) -> None:
        super().__init__(spec, context)
        self.checkpoint: Checkpoint = load_checkpoint(spec.source) if spec.source else context.checkpoint  # type: ignore[assignment]
        self.model = self.checkpoint.model.to(context.device).eval()

    @property
    def weights(self) -> str | None:
        return self.checkpoint.digest

    def full_views(self, images: Sequence[Image], size: int | None = None) -> tuple[Tensor, list[ViewMap]]:
        """Full views `[B, 3, S, S]` of the model's own kind, and how each maps back to its image."""
        spec = self.model.view_spec
        spec = spec if size is None else ViewSpec.from_dict({**spec.to_dict(), "size": size})
        views = make_views(images, None, spec, branches=("full",), device=self.context.device)
        assert views.full is not None
        return views.full, [view_map("full", spec, size_of(image)) for image in images]


def one_box(box: Tensor, score: float, image: Image) -> Detections:
    """A box `[4]` in pixels of the image, clipped to it; none where nothing of it is inside."""
    found = Detections(box[None].float().cpu(), torch.tensor([score]), (image.height, image.width))
    return found.usable().clipped()

"""Localizers without a network: boxes from a file, and the controls of `docs/method.md`, section 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Image

from ..boxes import BoxEntry, read_boxes
from ..boxes.detections import Detections
from ..errors import L2R2Error
from .base import Context, Localizer, LocalizerSpec, Option, number, size_of


class Full(Localizer):
    """The whole image is the box: a control for what fg gains without localization."""

    name = "full"

    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Return the whole image as the box."""
        return [Detections.from_lists([[0, 0, image.width, image.height]], size_of(image)) for image in images]


class Center(Localizer):
    """The center of the image, with `share` of its width and height: a control that zooms in but does not localize."""

    name = "center"
    known_options: ClassVar = {"share": Option(number(0.01, 1), 0.5, "a number between 0.01 and 1")}

    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        """Return the center box."""
        share = self.options["share"]

        def box(width: int, height: int) -> list[float]:
            left, top = (1 - share) / 2 * width, (1 - share) / 2 * height
            return [left, top, width - left, height - top]

        return [Detections.from_lists([box(image.width, image.height)], size_of(image)) for image in images]


class Boxes(Localizer):
    """Boxes from a file (see `boxes.read_boxes`), matched to images by path."""

    name = "boxes"
    source = "a box file"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if not spec.source:
            raise L2R2Error('The localizer boxes needs a box file; write "boxes:FILE".')
        self.table = read_boxes(spec.source)

    def about(self, name: str) -> str | None:
        """The image's entry in the file, so that changes to other entries do not matter."""
        try:
            return repr(self.table.find(name))
        except L2R2Error as error:
            return str(error)

    @property
    def info(self) -> dict[str, Any]:
        """As for any localizer, with the mark `oracle` of the box file."""
        return {**super().info, **({"oracle": True} if self.table.info.get("oracle") else {})}

    def find(self, images: list[Image], names: Sequence[str] | None, prompts: Any) -> list[Detections]:
        """Look up the boxes of each image; an image without an entry has none.

        Raises:
            L2R2Error: when names are missing, or an entry records a failure or another image size.
        """
        if names is None:
            raise L2R2Error(f"The localizer {self.spec} finds boxes by file name; pass files, not images.")
        entries = [self.table.find(name) or BoxEntry() for name in names]
        if failed := next((e.failure for e in entries if e.failure is not None), None):
            raise L2R2Error(f"{Path(self.spec.source).name}: {failed}")
        pairs = zip(entries, images, names)
        return [entry.detections(size_of(image), name).usable().clipped() for entry, image, name in pairs]

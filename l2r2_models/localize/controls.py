"""Localizers without a network: given boxes, and the controls that any other must beat (METHOD.md 6)."""

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
    """The whole image is the box: what a fg branch gains without any localizing."""

    name = "full"

    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        return [Detections.from_lists([[0, 0, image.width, image.height]], size_of(image)) for image in images]


class Center(Localizer):
    """The middle of the image, `share` of its width and height: it zooms and does not localize."""

    name = "center"
    known_options: ClassVar = {"share": Option(number(0.01, 1), 0.5, "a part of the side between 0.01 and 1")}

    def find(self, images: list[Image], names: Any, prompts: Any) -> list[Detections]:
        share = self.options["share"]

        def box(width: int, height: int) -> list[float]:
            left, top = (1 - share) / 2 * width, (1 - share) / 2 * height
            return [left, top, width - left, height - top]

        return [Detections.from_lists([box(image.width, image.height)], size_of(image)) for image in images]


class Boxes(Localizer):
    """Boxes of a file (see `box_files`), joined by path."""

    name = "boxes"
    source = "a box file"

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if not spec.source:
            raise L2R2Error('The localizer boxes needs a box file: "boxes:FILE".')
        self.table = read_boxes(spec.source)

    def about(self, name: str) -> str | None:
        """The image's entry: a file that grows changes nothing for the others."""
        try:
            return repr(self.table.find(name))
        except L2R2Error as error:
            return str(error)

    @property
    def info(self) -> dict[str, Any]:
        return {**super().info, **({"oracle": True} if self.table.info.get("oracle") else {})}

    def find(self, images: list[Image], names: Sequence[str] | None, prompts: Any) -> list[Detections]:
        """An image without an entry has no box.

        Raises:
            L2R2Error: names are missing, or an entry is a failure or of another image size.
        """
        if names is None:
            raise L2R2Error(f"The localizer {self.spec} finds boxes by file name; give it files, not images.")
        entries = [self.table.find(name) or BoxEntry() for name in names]
        if failed := next((e.failure for e in entries if e.failure is not None), None):
            raise L2R2Error(f"{Path(self.spec.source).name}: {failed}")
        pairs = zip(entries, images, names)
        return [entry.detections(size_of(image), name).usable().clipped() for entry, image, name in pairs]

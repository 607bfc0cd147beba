"""Shared by the formats of prediction files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class About:
    """What a format needs to know besides the records.

    Attributes:
        format: name of the format.
        header: the model and the settings that made the predictions.
        detector: name of the detector that found the boxes; empty if unknown.
        folder: folder of the images, to which other tools' file names are relative; None to keep the names as they are.
        completed: when the last prediction was made, in seconds since 1970; None if unknown.
        categories: ids of the box labels in the MegaDetector file that the boxes come from.
    """

    format: str
    header: Mapping[str, Any]
    detector: str = ""
    folder: Path | None = None
    completed: float | None = None
    categories: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """What our JSON keeps of the images and boxes, so that it can be written in the formats of other tools later."""
        folder = None if self.folder is None else str(self.folder)
        found = {"folder": folder, "detector": self.detector, "detection_categories": dict(self.categories)}
        return {key: value for key, value in found.items() if value}

    @classmethod
    def of_inputs(cls, format: str, header: Mapping[str, Any], inputs: Mapping[str, Any]) -> About:
        """Rebuild it from the field `inputs` of our JSON."""
        folder = inputs.get("folder")
        place = None if folder is None else Path(folder)
        return cls(format, header, inputs.get("detector", ""), place, categories=inputs.get("detection_categories", {}))

    def name_of(self, record: Mapping[str, Any]) -> str:
        """Return the name of an image for other tools, with forward slashes."""
        path = Path(record["file"])
        inside = self.folder is not None and path.is_relative_to(self.folder)
        return (path.relative_to(self.folder) if self.folder is not None and inside else path).as_posix()


class Ids(dict[str, int]):
    """Numbers of names; a new name gets the next number.

    >>> ids = Ids({"fox": 0, "owl": 1})
    >>> ids["owl"], ids["elk"], ids["bat"]
    (1, 2, 3)
    """

    def __missing__(self, name: str) -> int:
        self[name] = max(self.values(), default=-1) + 1
        return self[name]

    def names(self) -> dict[str, str]:
        """Return the names by number."""
        return {str(number): name for name, number in self.items()}


def line(data: Any) -> str:
    """Return data as one line of JSON."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False)

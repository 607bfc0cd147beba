"""Links from a report to the images on a page of `l2r2 explain`."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ..errors import L2R2Error
from ..io import check_readable


def anchor_of(image: str | Path) -> str:
    """Return the id of an image on the page: it is the same for each name of a file, and reveals none.

    >>> anchor_of("a.jpg") == anchor_of("./a.jpg"), len(anchor_of("a.jpg"))
    (True, 13)
    """
    return "e" + hashlib.sha256(os.fsencode(os.path.abspath(image))).hexdigest()[:12]


@dataclass(frozen=True)
class Explanations:
    """A page of `l2r2 explain`.

    Attributes:
        address: its address, relative to the report.
        anchors: ids of the images on it.
    """

    address: str
    anchors: frozenset[str]

    @classmethod
    def read(cls, page: Path, report: str | Path) -> Explanations:
        """Find the images on a page.

        Args:
            page: HTML file of `l2r2 explain`.
            report: the report that will link to it.

        Raises:
            L2R2Error: when the page cannot be read or has no explained images.
        """
        if page.exists():
            check_readable(page, most=None)
        text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
        found = re.findall(r'<div class="strip" id="(e[0-9a-f]{12})"', text)
        if not found:
            raise L2R2Error(f"{page}: has no explained images; write it with `l2r2 explain RUN IMAGES -o {page}` first.")
        relative = os.path.relpath(os.path.abspath(page), os.path.dirname(os.path.abspath(report)))
        return cls(quote(Path(relative).as_posix()), frozenset(found))

    def link(self, image: Path) -> str:
        """Return the address of an image's explanation; empty if it is not on the page."""
        anchor = anchor_of(image)
        return f"{self.address}#{anchor}" if anchor in self.anchors else ""

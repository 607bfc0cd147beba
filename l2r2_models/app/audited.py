"""The folder whose audit the page runs, with a bounded number of images."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

from ..audit.audit import AuditRun, run_audit
from ..audit.samples import Progress
from ..data.table import read_table
from ..errors import L2R2Error
from ..report.audit import write_report

COUNTS, USUAL = (20, 50, 100, 200), 50  # images per audit; each is changed some 40 times


class Folder:
    """A data set on which the model is audited.

    Args:
        model: run folder or Hub id of the model, which is loaded again for each audit.
        data: the data set, see `read_table`.
        boxes: a box file that replaces the boxes of its metadata.

    Raises:
        L2R2Error: when the data set or the box file cannot be read.
    """

    def __init__(self, model: str, data: Path, boxes: Path | None = None) -> None:
        self.model, self.data, self.boxes = model, data, boxes
        self.splits = read_table(data, boxes=boxes).splits

    @property
    def split(self) -> str | None:
        """The split to suggest: the first one for testing, else the last one; None without splits."""
        return next((name for name in self.splits if name.startswith("test")), self.splits[-1] if self.splits else None)

    def audit(self, split: str | None, images: int, progress: Progress) -> AuditRun:
        """Audit the model.

        Args:
            split: one of `splits`, or None if there are none.
            images: number of images, one of `COUNTS`, drawn at random.
            progress: wraps the iteration over the images.

        Raises:
            L2R2Error: when there is no such split, or as `run_audit` does.
        """
        if (split or None) not in (self.splits or (None,)):
            raise L2R2Error(f"There is no such split; choose from {', '.join(self.splits) or 'none'}.")
        if images not in COUNTS:
            raise L2R2Error(f"Choose {', '.join(map(str, COUNTS[:-1]))} or {COUNTS[-1]} images.")
        own, boxes = split or None, self.boxes
        return run_audit(self.model, self.data, split=own, boxes=boxes, limit=images, skip_bad=True, progress=progress)


def save_report(run: AuditRun, folder: Path) -> str:
    """Write the report of an audit into a new folder in `folder`; return its path."""
    path = Path(mkdtemp(prefix="audit-", dir=folder)) / "audit.html"
    write_report(path, run)
    return str(path)

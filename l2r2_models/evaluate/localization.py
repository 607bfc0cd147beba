"""Evaluation of localizer boxes against the ground truth of a data set, and a contact sheet of the worst ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou

from ..boxes import BoxEntry, read_boxes
from ..boxes.detections import BOX_THRESHOLD, Detections
from ..data.table import Row, read_table
from ..errors import L2R2Error
from ..images import load_image, load_mask
from ..io import write_atomic
from .metrics import bootstrap_interval

CORLOC = 0.5  # IoU from which a box counts as correct (CorLoc, Deselaers et al. 2012)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class JudgedBox:
    """Result for one image with a ground-truth box.

    Attributes:
        path: path of the image.
        truth: xyxy in pixels, the true box with the largest overlap.
        found: xyxy in pixels, the best box of the localizer, or None.
        iou: IoU of the two boxes; 0 if nothing was found.
        recall: fraction of the object inside the found box, measured on its mask if there is one, else on its box.
        why: why nothing was found; empty if a box was found.
    """

    path: Path
    truth: tuple[float, ...]
    found: tuple[float, ...] | None
    iou: float
    recall: float
    why: str = ""


@dataclass(frozen=True)
class BoxReport:
    """Metrics over the images that have a ground-truth box; fractions are in [0, 1].

    Attributes:
        localizer: localizer spec from the box file, or empty.
        oracle: whether the true labels were used as prompts.
        threshold: score below which a box counts as not found.
        images: number of images with a true box.
        corloc: fraction of images whose best box has an IoU of at least 0.5 with a true box.
        corloc_interval: its 95 % confidence interval.
        mean_iou, quantiles, histogram: of the IoU, which is 0 if nothing was found; the histogram has ten bins of width 0.1.
        area_recall: mean fraction of the object inside the found box, 0 if nothing was found.
        missed, failed, unlisted: number of images without a found box; of those, with a failed localizer, or not in the box file.
        empty, false_boxes: number of images without a true box, and of those in which a box was found nevertheless.
        unreadable: reasons by image that could not be opened.
        judged: results per image, worst first.
    """

    localizer: str
    oracle: bool
    threshold: float
    images: int
    corloc: float
    corloc_interval: tuple[float, float]
    mean_iou: float
    quantiles: dict[str, float]
    histogram: tuple[int, ...]
    area_recall: float
    missed: int
    failed: int
    unlisted: int
    empty: int
    false_boxes: int
    unreadable: dict[str, str]
    judged: tuple[JudgedBox, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the results per image."""
        data = asdict(self)
        del data["judged"]
        return data


def evaluate_boxes(
    boxes: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    metadata: str | Path | None = None,
    threshold: float = BOX_THRESHOLD,
    progress: Progress = lambda steps, _: steps,
) -> BoxReport:
    """Compare the best box of each image with the ground truth.

    Args:
        boxes: box file.
        data: data set whose metadata have boxes or masks, see `read_table`.
        split: use only this split.
        metadata: see `read_table`.
        threshold: boxes with a lower score count as not found.
        progress: wraps the images.

    Raises:
        L2R2Error: when no image has a true box, or the box file matches none of the images.
    """
    table, of_data = read_boxes(boxes), read_table(data, metadata=metadata)
    rows: dict[Path, list[Row]] = {}
    for row in (of_data.of_split(split) if split else of_data).rows:
        rows.setdefault(row.path, []).append(row)
    entries = table.join(rows)
    judged: list[JudgedBox] = []
    unreadable: dict[str, str] = {}
    empty: list[bool] = []  # for each image without a true box, whether a box was found
    for path, of_image in progress(rows.items(), len(rows)):
        try:
            found = _evaluate(path, of_image, entries.get(str(path)), threshold)
        except L2R2Error as error:
            unreadable[str(path)] = str(error)
            continue
        if isinstance(found, JudgedBox):
            judged.append(found)
        else:
            empty.append(found)
    if not judged:
        raise L2R2Error(f"{of_data.root}: no image has a true box or mask to compare with.")
    return _report(table.info, threshold, judged, empty, unreadable)


def _report(
    info: dict[str, Any], threshold: float, judged: list[JudgedBox], empty: list[bool], unreadable: dict[str, str]
) -> BoxReport:
    iou = torch.tensor([one.iou for one in judged], dtype=torch.double)
    right = (iou >= CORLOC).double()
    interval = bootstrap_interval(right)
    counts = torch.histc(iou, 10, 0, 1).long().tolist()
    why = [one.why for one in judged]
    return BoxReport(
        localizer=str(info.get("localizer", "")),
        oracle=bool(info.get("oracle")),
        threshold=threshold,
        images=len(judged),
        corloc=float(right.mean()),
        corloc_interval=(float(interval[0]), float(interval[1])),
        mean_iou=float(iou.mean()),
        quantiles={f"{q:g}": float(iou.quantile(q)) for q in QUANTILES},
        histogram=tuple(counts),
        area_recall=sum(one.recall for one in judged) / len(judged),
        missed=sum(one.found is None for one in judged),
        failed=sum(w.startswith("failed") for w in why),
        unlisted=sum(w == UNLISTED for w in why),
        empty=len(empty),
        false_boxes=sum(empty),
        unreadable=unreadable,
        judged=tuple(sorted(judged, key=lambda one: (one.iou, one.recall))),
    )


UNLISTED = "not listed in the box file"


def _evaluate(path: Path, rows: Sequence[Row], entry: BoxEntry | None, threshold: float) -> JudgedBox | bool:
    """Evaluate one image; if it has no true box, return whether a box was found."""
    image = load_image(path)
    size = (image.height, image.width)
    mask = load_mask(rows[0].mask_file, size) if rows[0].mask_file else None
    given = [row.entry.detections(size, str(path)).usable().clipped().boxes for row in rows if row.entry is not None]
    truth = torch.cat(given) if given else torch.zeros(0, 4)
    if not len(truth) and mask is not None:
        truth = Detections.from_mask(mask).boxes
    found, why = _best(entry, size, str(path), threshold)
    if not len(truth):
        return found is not None
    if found is None:
        return JudgedBox(path, tuple(truth[0].tolist()), None, 0.0, 0.0, why)
    overlap = box_iou(truth.double(), found[None].double())[:, 0]
    best = int(overlap.argmax())
    inside = _inside(truth[best], found) if mask is None else _mask_inside(mask, found)
    return JudgedBox(path, tuple(truth[best].tolist()), tuple(found.tolist()), float(overlap[best]), inside)


def _best(entry: BoxEntry | None, size: tuple[int, int], name: str, threshold: float) -> tuple[Tensor | None, str]:
    if entry is None:
        return None, UNLISTED
    if entry.failure is not None:
        return None, f"failed: {entry.failure}"
    found = entry.detections(size, name)
    if not len(found):
        return None, "nothing found"
    sure = found.above(threshold).usable().clipped()
    return (sure.boxes[0], "") if len(sure) else (None, f"no usable box reaches the score {threshold:g}")


def _inside(truth: Tensor, found: Tensor) -> float:
    """Return the fraction of the true box `[4]` that the found box covers."""
    start, end = torch.maximum(truth[:2], found[:2]), torch.minimum(truth[2:], found[2:])
    return float((end - start).clamp(min=0).prod() / (truth[2:] - truth[:2]).prod())


def _mask_inside(mask: Tensor, found: Tensor) -> float:
    windows, _ = Detections(found[None], torch.ones(1), (mask.shape[0], mask.shape[1])).windows()
    x0, y0, x1, y1 = windows[0].tolist()
    return float(mask[y0:y1, x0:x1].sum() / mask.sum().clamp(min=1))


def draw_worst(report: BoxReport, path: str | Path, count: int = 10, side: int = 260) -> None:
    """Draw a contact sheet of the images with the worst boxes (true boxes green, found boxes red), written atomically.

    Raises:
        L2R2Error: when the file cannot be written.
    """
    worst = report.judged[:count]
    columns = min(5, len(worst))
    sheet = Image.new("RGB", (columns * side, -(-len(worst) // columns) * (side + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, one in enumerate(worst):
        left, top = i % columns * side, i // columns * (side + 30)
        image = load_image(one.path)
        scale = (side - 8) / max(image.size)
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        marks = ImageDraw.Draw(small)
        for box, color in ((one.truth, "#16a34a"), (one.found, "#dc2626")):
            if box is not None:
                marks.rectangle([v * scale for v in box], outline=color, width=3)
        sheet.paste(small, (left + 4, top + 4))
        words = one.why or f"IoU {one.iou:.2f}, {100 * one.recall:.0f} % of the object"
        draw.text((left + 4, top + side), f"{one.path.name[:38]}\n{words[:42]}", fill="black")
    write_atomic(path, lambda temporary: sheet.save(temporary, "PNG"))

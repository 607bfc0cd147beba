"""Write box files: MegaDetector 1.6, COCO, plain xyxy or Parquet, always atomically."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import L2R2Error
from ..io import write_json
from .parquet import write_parquet
from .rle import Rle
from .table import Box, BoxEntry, BoxTable


def write_boxes(table: BoxTable, path: str | Path, format: str = "megadetector") -> None:
    """Write a table as `megadetector` (1.6), `coco` or `xyxy` JSON, or as `parquet`, atomically.

    Masks are written as COCO RLE: under `mask` in MegaDetector's detections, under `segmentation` in COCO's annotations. The
    format xyxy has no masks and no failures.

    Args:
        table: the boxes.
        path: the file to write.
        format: one of `FORMATS`.

    Raises:
        L2R2Error: when the format is unknown, an entry lacks the image size that it needs, or the file cannot be written.
    """
    if format not in FORMATS:
        raise L2R2Error(f'Unknown box format "{format}"; choose from {", ".join(FORMATS)}.')
    if format == "parquet":
        write_parquet(table, Path(path))
    else:
        write_json(path, _WRITERS[format](table))


def _to_megadetector(table: BoxTable) -> dict[str, Any]:
    names = sorted({label or "object" for e in table.entries.values() for label in e.labels} | {"object"})
    ids = {name: str(i) for i, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    for file, entry in table.entries.items():
        if entry.failure is not None:
            images.append({"file": file, "failure": entry.failure, **_stamp(table, file)})
            continue
        height, width = (1, 1) if entry.normalized else _size(entry, file, "megadetector")
        found = [
            {
                "category": ids[label or "object"],
                "conf": round(score, 4),
                "bbox": [round(v, 9) for v in (x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height)],
                **({} if mask is None else {"mask": mask.to_coco()}),
            }
            for (x0, y0, x1, y1), score, label, mask in zip(entry.boxes, entry.scores, entry.labels, _masks(entry))
        ]
        sizes = {} if entry.image_size is None else {"width": entry.image_size[1], "height": entry.image_size[0]}
        images.append({"file": file, **sizes, "detections": found, **_stamp(table, file)})
    categories = {i: name for name, i in ids.items()}
    info = {"format_version": "1.6", "detector": table.info.get("localizer", "l2r2-models"), **_info(table)}
    return {"info": info, "detection_categories": categories, "images": images}


def _to_coco(table: BoxTable) -> dict[str, Any]:
    names = sorted({label or "object" for e in table.entries.values() for label in e.labels})
    ids = {name: i for i, name in enumerate(names, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file, entry) in enumerate(table.entries.items(), 1):
        image: dict[str, Any] = {"id": number, "file_name": file, **_stamp(table, file)}
        if entry.failure is not None:  # the size of an unreadable image is unknown
            images.append({**image, "failure": entry.failure})
            continue
        height, width = _size(entry, file, "coco")
        images.append({**image, "width": width, "height": height})
        for (x0, y0, x1, y1), score, label, mask in zip(_pixels(entry, file), entry.scores, entry.labels, _masks(entry)):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": ids[label or "object"],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }
            annotations.append(annotation if mask is None else {**annotation, "segmentation": mask.to_coco()})
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"info": _info(table), "images": images, "annotations": annotations, "categories": categories}


def _to_xyxy(table: BoxTable) -> dict[str, Any]:
    found = {file: entry for file, entry in table.entries.items() if entry.failure is None}
    return {file: [list(box) for box in _pixels(entry, file)] for file, entry in found.items()}


_WRITERS: dict[str, Callable[[BoxTable], Any]] = {"megadetector": _to_megadetector, "coco": _to_coco, "xyxy": _to_xyxy}
FORMATS = (*_WRITERS, "parquet")


def _info(table: BoxTable) -> dict[str, Any]:
    return {"l2r2": table.info} if table.info else {}


def _stamp(table: BoxTable, file: str) -> dict[str, str]:
    return {"stamp": table.stamps[file]} if file in table.stamps else {}


def _masks(entry: BoxEntry) -> tuple[Rle | None, ...]:
    return entry.masks or (None,) * len(entry.boxes)


def _pixels(entry: BoxEntry, file: str) -> list[Box]:
    height, width = _size(entry, file, "pixel") if entry.normalized and entry.boxes else (1, 1)
    return [(x0 * width, y0 * height, x1 * width, y1 * height) for x0, y0, x1, y1 in entry.boxes]


def _size(entry: BoxEntry, file: str, format: str) -> tuple[int, int]:
    if entry.image_size is None:
        raise L2R2Error(f"{file}: the {format} format needs its image size, which is unknown; choose another format.")
    return entry.image_size

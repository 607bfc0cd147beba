"""Data sets in shards, packed from the folder of `conftest.write_dataset`."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

BOX = ("x0", "y0", "x1", "y1")


def png(level=90, size=(8, 6), mode="RGB", **options) -> bytes:
    """An encoded image of one color."""
    stream = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level,) * 3).save(stream, "png", **options)
    return stream.getvalue()


def write_tar(path: Path, members) -> Path:
    """A tar of `(name, content)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def metadata_of(folder: Path):
    """Rows of metadata.csv by split."""
    by_split: dict[str, list[dict[str, str]]] = {}
    with open(folder / "metadata.csv", newline="") as file:
        for row in csv.DictReader(file):
            by_split.setdefault(row["split"], []).append(row)
    return by_split


def members_of(folder: Path, rows):
    """The members of a tar: each image, and its label and box as JSON."""
    for row in rows:
        about = {"label": row["label"], "boxes": [[float(row[key]) for key in BOX]]}
        yield row["file_name"], (folder / row["file_name"]).read_bytes()
        yield str(Path(row["file_name"]).with_suffix(".json")), json.dumps(about).encode()


def in_tars(folder: Path, out: Path, size: int = 5) -> Path:
    """Pack a data set in tars of `size` images: out/train-00000.tar, ..."""
    for split, rows in metadata_of(folder).items():
        for number, start in enumerate(range(0, len(rows), size)):
            write_tar(out / f"{split}-{number:05}.tar", members_of(folder, rows[start : start + size]))
    return out


def in_parquet(folder: Path, out: Path, size: int = 3) -> Path:
    """Pack a data set in one Parquet file per split as `datasets` names them, with `size` images per row group."""
    (out / "data").mkdir(parents=True)
    for split, rows in metadata_of(folder).items():
        images = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
        columns = {"image": images, "label": [row["label"] for row in rows]}
        columns |= {key: [int(row[key]) for row in rows] for key in BOX}
        parquet.write_table(pa.table(columns), out / "data" / f"{split}-00000-of-00001.parquet", row_group_size=size)
    return out

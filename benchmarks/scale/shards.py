"""What images in shards cost: the index, the table, and reading in random order, beside single files.

    python benchmarks/scale/shards.py FOLDER

writes copies of one noise JPEG into FOLDER as files, tars of 5,000 images, and Parquet with small and with large row groups, and
prints CPU times and sizes per image. CPU times of this process, because other jobs may run; the files are in the page cache.
"""

import argparse
import io
import random
import tarfile
import time
import tracemalloc
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

import l2r2_models
from l2r2_models import shards
from l2r2_models.data.shards import index_shards
from l2r2_models.data.table import read_table, rows_digest

PER_TAR = 5000
GROUPS = {"parquet, row groups of 16": 16, "parquet, row groups of 100 MB": 3750}


def write(folder: Path, images: int) -> dict[str, Path]:
    """Write the images in each form; the paths by form."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (75, 75, 3), np.uint8)
    Image.fromarray(noise).resize((300, 300), Image.Resampling.BILINEAR).save(stream, "jpeg", quality=75)
    data = stream.getvalue()
    print(f"one image: {len(data)} bytes")
    names = [f"site{i % 50:02}/{i:08}.jpg" for i in range(images)]
    forms = {form: folder / form.split(",")[0].replace(" ", "") / str(n) for n, form in enumerate(["files", "tar", *GROUPS])}
    for path in forms.values():
        path.mkdir(parents=True)
    lines = ["file_name,label,x0,y0,x1,y1"]
    for i, name in enumerate(names[: images // 10]):
        file = forms["files"] / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        lines.append(f"{name},{i % 9},10,20,200,210")
    (forms["files"] / "metadata.csv").write_text("\n".join(lines))
    for start in range(0, images, PER_TAR):
        with tarfile.open(forms["tar"] / f"train-{start // PER_TAR:05}.tar", "w") as archive:
            for i, name in enumerate(names[start : start + PER_TAR]):
                about = b'{"label": "%d", "boxes": [[10, 20, 200, 210]]}' % (i % 9)
                for member, content in ((name, data), (name.replace(".jpg", ".json"), about)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    for form, rows in GROUPS.items():
        columns = {"image": [{"bytes": data, "path": name} for name in names]}
        columns |= {"label": [str(i % 9) for i in range(images)]}
        columns |= {key: [value] * images for key, value in {"x0": 10, "y0": 20, "x1": 200, "y1": 210}.items()}
        parquet.write_table(pa.table(columns), forms[form] / "train-00000-of-00001.parquet", row_group_size=rows)
    return forms


def seconds(work) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(form: str, data: Path, cache: Path, reads: int) -> None:
    """Print the costs of one form."""
    before = set(cache.rglob("*.npz"))
    index = seconds(lambda: index_shards(data))
    size = sum(file.stat().st_size for file in set(cache.rglob("*.npz")) - before)
    tracemalloc.start()
    table = read_table(data)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    read = seconds(lambda: read_table(data))
    digest = seconds(lambda: rows_digest(table))
    draw = random.Random(0)
    paths = [draw.choice(table.rows).path for _ in range(reads)]
    reading = seconds(lambda: [shards.read(path) or path.read_bytes() for path in paths])
    n = len(table)
    numbers = [f"{1e6 * value / n:.0f}" for value in (index, read, digest)] + [f"{1e6 * reading / reads:.0f}"]
    print(",".join([form.replace(",", ""), str(n), *numbers, f"{size / n:.0f}", f"{held / n:.0f}"]), flush=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=50_000)
    options = parser.parse_args()
    cache = options.folder / "cache"
    huggingface_hub.constants.HF_HOME = str(cache)
    forms = write(options.folder, options.images)
    print("l2r2-models", l2r2_models.__version__, "pyarrow", pa.__version__, "numpy", np.__version__)
    print("form,images,index us,table us,digest us,read us,index on disk bytes,table and index in memory bytes")
    for form, data in forms.items():
        measure(form, data, cache, 200 if "100 MB" in form else 2000)


if __name__ == "__main__":
    main()

"""Memory and saving over a large folder, and what is left after kills: `l2r2 predict` on tiny JPEGs with a tiny network.

    python benchmarks/speed/many_images.py [--images 100000] [--kills 0] [--workers 2] [--data FOLDER --run RUN] [--csv FILE]

Writes 64 JPEGs of 96x72 pixels and copies of them in folders of 1,000, and predicts them in a process of its own. With --data
and --run, they are copies of the photos of a data set, with its boxes, and the network is that of the run. With --kills K, the
process is stopped by SIGKILL K times, at evenly spaced numbers of stored predictions, and started again by the same call.
Prints, and appends to the CSV: the peak memory of the last process after its first 1,000 predictions and at its end; the share
of its processor time that went into storing predictions and writing the file; the number of predictions stored at each kill,
and kept after the last. Fails if an image is missing or appears twice, or if a stored prediction was lost.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

from l2r2_models.boxes import BoxEntry
from l2r2_models.checkpoints.checkpoint import save_checkpoint
from l2r2_models.data.table import read_table
from l2r2_models.predict.benchmark import synthetic_photos
from l2r2_models.predict.inputs import gather
from l2r2_models.predict.predict_files import predict_to_file
from l2r2_models.predict.predictor import Predictor
from l2r2_models.views import ViewSpec

EARLY = 1000
BOXES = "boxes.json"


def prepare(folder: Path, images: int, data: Path | None, run: Path | None) -> None:
    """Write a folder of images with their boxes, and a run if none is given."""
    if run is None:
        torch.manual_seed(0)
        model = timm.create_model("l2r2", backbone="test_resnet", num_classes=12)
        model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg, size=32)
        save_checkpoint(model, folder / "run", [f"class {i}" for i in range(12)])
    else:
        (folder / "run").symlink_to(run.resolve())
    originals, photos = folder / "originals", folder / "photos"
    originals.mkdir()
    if data is None:
        made = synthetic_photos(originals, min(64, images), (96, 72))
        paths, entries = made.paths, made.entries
    else:
        table = read_table(data)
        paths, entries = tuple(row.path for row in table.rows), table.entries()
    boxes: dict[str, list] = {}
    for i in range(images):
        original = paths[i % len(paths)]
        place = photos / f"{i // 1000:03}" / f"{i:06}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, place)
        boxes[str(place.relative_to(photos))] = [list(entries[str(original)].boxes[0])]
    (folder / BOXES).write_text(json.dumps(boxes))


def predict(folder: Path, out: Path, workers: int) -> None:
    """Predict the folder, and write what was measured."""
    torch.set_num_threads(1)
    inputs = gather([folder / "photos"], folder / BOXES)
    assert len(inputs.entries) == len(inputs.paths) and isinstance(next(iter(inputs.entries.values())), BoxEntry)
    predictor = Predictor.from_pretrained(folder / "run", workers=workers, device="cpu")
    found = {"early": 0, "todo": 0, "saving": 0.0, "total": 0.0}
    start, last = time.process_time(), [time.thread_time()]

    def watched(predictions, count):
        found["todo"] = count
        for number, prediction in enumerate(predictions, 1):
            last[0] = time.thread_time()
            yield prediction
            found["saving"] += time.thread_time() - last[0]  # what the caller does with a prediction: it is stored
            last[0] = time.thread_time()
            if number == min(EARLY, count):
                found["early"] = peak()
        last[0] = time.thread_time()

    report = predict_to_file(predictor, inputs, out, watched)
    found["saving"] += time.thread_time() - last[0]  # after the last prediction, the file is written
    found |= {"total": time.process_time() - start, "end": peak(), "kept": report.kept, "failures": len(report.failures)}
    (folder / "measured.json").write_text(json.dumps(found))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stored(out: Path) -> int:
    """The number of predictions in the journal."""
    files = out.with_name(f"{out.name}.parts").glob("part-*.jsonl")
    return sum(file.read_bytes().count(b"\n") - 1 for file in files if file.stat().st_size)


def run_with_kills(folder: Path, out: Path, images: int, kills: int, workers: int) -> list[int]:
    """Predict the folder; return the number of stored predictions at each kill."""
    command = [sys.executable, __file__, "--child", str(folder), "--out", str(out), "--workers", str(workers)]
    at = []
    for kill in range(1, kills + 1):
        child = subprocess.Popen(command)
        while stored(out) < kill * images // (kills + 1):
            if child.poll() is not None:
                raise SystemExit(f"the process ended by itself before kill {kill}")
            time.sleep(0.2)
        child.kill()
        child.wait()
        at.append(stored(out))
    subprocess.run(command, check=True)
    return at


def check(out: Path, images: int) -> None:
    names = [image["file"] for image in json.loads(out.read_text())["images"]]
    if len(names) != images or len(set(names)) != images:
        raise SystemExit(f"{len(names)} predictions of {len(set(names))} images, not {images}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        predict(options.child, options.out, options.workers)
        return
    with TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "predictions.json"
        prepare(folder, options.images, options.data, options.run)
        start = time.perf_counter()
        at = run_with_kills(folder, out, options.images, options.kills, options.workers)
        elapsed = time.perf_counter() - start
        check(out, options.images)
        found = json.loads((folder / "measured.json").read_text())
        size = out.stat().st_size
    if found["failures"] or (at and found["kept"] < at[-1]):
        raise SystemExit(f"{found['failures']} failures; {found['kept']} predictions kept of {at[-1:]} stored")
    line = {
        "images": options.images,
        "kills": options.kills,
        "stored_at_kills": " ".join(map(str, at)),
        "kept_after_last_kill": found["kept"],
        "peak_mib_after_1000": round(found["early"] / 2**20, 1),
        "peak_mib_at_end": round(found["end"] / 2**20, 1),
        "ratio": round(found["end"] / found["early"], 3),
        "saving_share": round(found["saving"] / found["total"], 4),
        "cpu_s": round(found["total"], 1),
        "wall_s": round(elapsed, 1),
        "file_mb": round(size / 1e6, 1),
        "workers": options.workers,
        "data": options.data.name if options.data else "96x72",
        "network": json.loads((options.run / "config.json").read_text())["architecture"] if options.run else "test_resnet",
        **{name: version(name) for name in ("torch", "timm", "pillow")},
        "date": str(datetime.date.today()),
    }
    print(json.dumps(line))
    if options.csv:
        new = not options.csv.exists()
        with open(options.csv, "a", newline="") as stream:
            writer = csv.DictWriter(stream, line, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(line)


if __name__ == "__main__":
    main()

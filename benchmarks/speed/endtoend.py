"""From files to answers: `l2r2 predict` against what people write by hand, on a CPU or a GPU.

    python benchmarks/speed/endtoend.py [--backbone resnet50] [--images 96] [--size 500x400] [--workers 2] [--rounds 3]

Rows: a plain timm classifier with timm's transform in a DataLoader; two timm networks with Pillow crops in a DataLoader of as
many workers (what an L2R2 model replaces), in batches of 32 and of 4, which suit the caches of a CPU; the shared L2R2 of the
same backbone; the same with a cascade (a threshold that half of the boxes pass), with a full view of 128 pixels, in bfloat16
(if the processor has it), with all three; for a ViT, instead of the smaller view, with an fg branch that sees only the patches
of the object (`tokens`); and ONNX Runtime behind L2R2's own decoding. All see the same made-up photos, one box each, and random
weights; the rounds alternate and the medians are compared, after a round to warm up. `ratio` is the time of the two networks in
batches of 32 over the row's. `network` is images per second of the network alone, on views in memory. Peak memory is what
PyTorch allocates on the device, in MiB, above the loaded networks; only of this process, so without what DataLoader workers
decode. Appends to benchmarks/results/endtoend_DEVICE.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from growth import allocated
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from l2r2_models.boxes import BoxEntry
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.checkpoints.export import export_run
from l2r2_models.hardware import has_bf16
from l2r2_models.pipe import in_order
from l2r2_models.predict.benchmark import synthetic_photos
from l2r2_models.predict.inputs import Inputs
from l2r2_models.predict.predictor import Predictor

RESULTS = Path(__file__).parent.parent / "results"
CLASSES, BATCH = 100, 32
BASE = "two timm networks, Pillow crops"


class Photos(Dataset):
    """Views as people cut them by hand: timm's transform of the image, and of the Pillow crop of its box."""

    def __init__(self, inputs: Inputs, side: int, crops: bool) -> None:
        self.rows = [(path, inputs.entries[str(path)].boxes[0]) for path in inputs.paths]
        self.transform = timm.data.create_transform(input_size=(3, side, side), interpolation="bicubic", crop_pct=1.0)
        self.crops = crops

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        path, box = self.rows[i]
        image = Image.open(path).convert("RGB")
        return torch.stack([self.transform(image), *([self.transform(image.crop(box))] if self.crops else [])])


def by_hand(
    inputs: Inputs, networks: list[torch.nn.Module], workers: int, device: torch.device, batch: int = BATCH
) -> Callable[[], None]:
    def call() -> None:
        photos = Photos(inputs, 224, len(networks) > 1)
        with torch.inference_mode():
            for views in DataLoader(photos, batch, num_workers=workers, pin_memory=device.type == "cuda"):
                views = views.to(device, non_blocking=True)
                logits = [network(views[:, k]) for k, network in enumerate(networks)]
                torch.stack(logits).softmax(-1).max(-1)[0].tolist()

    return call


def predicting(predictor: Predictor, inputs: Inputs) -> Callable[[], None]:
    return lambda: [prediction.to_dict() for prediction in predictor.predict_files(inputs.paths, inputs.entries)] and None


def by_onnx(predictor: Predictor, inputs: Inputs, file: Path) -> Callable[[], None]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def cut(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        item = predictor.decode(path, inputs.entries[str(path)])
        views = predictor.network.cut(item, item.rows).views
        return views.full, views.fg, views.has_fg

    def run(batch: list) -> None:
        full, fg, has_fg = (torch.cat(part).numpy() for part in zip(*batch))
        session.run(None, {"full_view": full, "fg_view": fg, "has_fg": has_fg})[0].argmax(-1).tolist()

    def call() -> None:
        batch = []
        for views in in_order(cut, inputs.paths, predictor.workers, ahead=BATCH):
            batch.append(views)
            if len(batch) == BATCH:
                run(batch)
                batch = []
        if batch:
            run(batch)

    return call


def network_alone(call: Callable[[torch.Tensor], object], device: torch.device, passes: int = 3) -> float:
    """Images per second of the network on views in memory."""
    x = torch.randn(BATCH, 3, 224, 224, device=device)
    times = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            call(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return BATCH / statistics.median(times[1:])


def peak_memory(call: Callable[[], None], device: torch.device) -> float:
    """Peak of the memory that PyTorch allocates on the device during a call, above the use before it, in MiB."""
    if device.type == "cpu":
        return allocated(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def middle_confidence(predictor: Predictor, inputs: Inputs) -> float:
    """The threshold that half of the boxes pass."""
    found = [p.objects[0] for p in predictor.predict_files(inputs.paths, inputs.entries)]
    return statistics.median(answer.fg.score for answer in found if answer.fg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size", default="500x400")
    parser.add_argument("--share", type=float, default=0.4, help="side of the box, relative to that of the photo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width, height = map(int, options.size.split("x"))
    torch.manual_seed(0)
    model = timm.create_model("l2r2", backbone=options.backbone, num_classes=CLASSES, fusion="robust")
    plain = [timm.create_model(options.backbone, num_classes=CLASSES).to(device).eval() for _ in range(2)]
    rows: dict[str, Callable[[], None]] = {}
    alone: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        run, photos = Path(folder) / "run", Path(folder) / "photos"
        photos.mkdir()
        save_checkpoint(model, run, [f"class {i}" for i in range(CLASSES)])
        if is_vit := options.backbone.startswith(("vit_", "deit")):
            other = timm.create_model("l2r2", backbone=options.backbone, num_classes=CLASSES, fusion="robust", fg_mode="tokens")
        else:
            other = model
            other.view_spec = dataclasses.replace(model.view_spec, sizes={"full": 128})
        save_checkpoint(other, Path(folder) / "other", [f"class {i}" for i in range(CLASSES)])
        small = {"run": Path(folder) / "other"}
        inputs = synthetic_photos(photos, options.images, (width, height))
        for name, entry in list(inputs.entries.items()):
            x0, y0 = (min(start, (1 - options.share) * side) for start, side in zip(entry.boxes[0], (width, height)))
            box = (x0, y0, x0 + options.share * width, y0 + options.share * height)
            inputs.entries[name] = BoxEntry((box,), (1.0,), ("",))

        def predictor(run: Path = run, **more: object) -> Predictor:
            made = Predictor(load_checkpoint(run), workers=options.workers, batch_size=BATCH, device=device, **more)
            made.model.fusion.threshold.fill_(threshold)
            return made

        threshold = 0.5
        threshold = middle_confidence(predictor(), inputs)
        rows["plain timm, timm's transform"] = by_hand(inputs, plain[:1], options.workers, device)
        rows[BASE] = by_hand(inputs, plain, options.workers, device)
        rows[f"{BASE}, batches of 4"] = by_hand(inputs, plain, options.workers, device, batch=4)
        variants: dict[str, dict[str, object]] = {"L2R2": {}, "L2R2, cascade": {"cascade": 0}}
        variants["L2R2, fg of the object's patches" if is_vit else "L2R2, full of 128 px"] = small
        if has_bf16(device):
            variants["L2R2, bfloat16"] = {"precision": "bf16"}
            if not is_vit:
                variants["L2R2, all three"] = {"precision": "bf16", **small, "cascade": 0}
        made = {name: predictor(**more) for name, more in variants.items()}
        rows |= {name: predicting(one, inputs) for name, one in made.items()}
        if options.onnx and device.type == "cpu":
            file = export_run(run, Path(folder) / "run.onnx").file
            rows["L2R2, ONNX Runtime"] = by_onnx(made["L2R2"], inputs, file)
        alone["plain timm, timm's transform"] = network_alone(plain[0], device)
        alone[BASE] = network_alone(lambda x: [network(x) for network in plain], device)
        for name in ("L2R2", "L2R2, bfloat16"):
            if name in made:
                one = made[name].network
                alone[name] = network_alone(lambda x, one=one: one.logits({"full": x, "fg": x}), device)
        peaks = {name: peak_memory(call, device) for name, call in rows.items() if "ONNX" not in name}
        times: dict[str, list[float]] = {name: [] for name in rows}
        for turn in range(options.rounds + 1):
            for name, call in rows.items():
                start = time.perf_counter()
                call()
                if turn:
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {threads} threads"
    about = {"backbone": options.backbone, "photos": options.size, "box": options.share, "images": options.images}
    about |= {"batch": BATCH, "workers": options.workers, "rounds": options.rounds, "device": where}
    about |= {name: version(name) for name in ("torch", "timm", "pillow")} | {"date": str(datetime.date.today())}
    file = RESULTS / f"endtoend_{device.type}.csv"
    lines = [
        {
            "row": name,
            "images_per_s": round(options.images / spent, 2),
            "ratio": round(medians[BASE] / spent, 2),
            "network_images_per_s": round(alone[name], 2) if name in alone else "",
            "memory_mib": round(peaks[name], 1) if name in peaks else "",
            **about,
        }
        for name, spent in medians.items()
    ]
    for line in lines:
        print(f"{line['row']:36} {line['images_per_s']:8} images/s  {line['ratio']:5}x  network {line['network_images_per_s']}")
    new = not file.exists()
    with open(file, "a", newline="") as stream:
        writer = csv.DictWriter(stream, lines[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()

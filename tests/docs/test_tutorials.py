"""The commands of the quickstart, the tutorials and the guides run in order, on small data and with small networks.

Weights of a Hub are replaced by random ones of small networks, and the boxes that a random detector finds by true ones.
"""

import csv
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS
from markdown_pages import ROOT, commands
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LITE = "tf_efficientnet_lite0.in1k"  # weights of a package
FIRST = ["finetune", "data/", "--model", "timm:resnet10t", "--val-fraction", "0.2"]
BEFORE = {  # runs that a page takes for granted
    "tutorials/audit.md": [[*FIRST, "--branches", "full", "-o", "runs/plain"]],
    "guides/localizers.md": [[*FIRST, "--box-head", "-o", "runs/fungi"]],
    "guides/evaluation.md": [[*FIRST, "-o", "runs/fungi"]],
    "guides/sharing.md": [
        [*FIRST, "-o", "runs/fungi"],
        [*FIRST, "--branches", "full", "-o", "runs/plain"],
        [*FIRST, "--branches", "fg", "-o", "runs/crops"],
        ["evaluate", "runs/fungi", "data/", "--split", "test"],
    ],
}
PAGES = ["quickstart.md", *sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs" / "tutorials").glob("*.md"))]
PAGES += ["guides/training.md", "guides/localizers.md", "guides/evaluation.md", "guides/sharing.md"]


class Maker:
    """Makes images of a colored square on noise, and keeps where each square is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng, self.boxes = folder, np.random.default_rng(0), {}

    def image(self, name: str, label: str, mask: str | None = None) -> tuple[int, ...]:
        pixels = self.rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        x, y = int(self.rng.integers(0, 40)), int(self.rng.integers(0, 20))
        pixels[y : y + 18, x : x + 18] = COLORS[label]
        self.save(name, Image.fromarray(pixels))
        if mask:
            drawn = Image.new("L", (60, 40))
            ImageDraw.Draw(drawn).ellipse((x, y, x + 17, y + 17), fill=255)
            self.save(mask, drawn)
        self.boxes[name] = (x, y, x + 18, y + 18)
        return self.boxes[name]

    def save(self, name: str, image: Image.Image) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(self.folder / name)

    def table(self, name: str, columns: tuple[str, ...], rows: list[tuple]) -> None:
        with open(self.folder / name, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    def megadetector(self, name: str, images: list[str]) -> None:
        found = [
            {"file": i, "detections": [{"category": "1", "conf": 0.9, "bbox": [x0 / 60, y0 / 40, 18 / 60, 18 / 40]}]}
            for i in images
            for x0, y0, _, _ in [self.boxes[i]]
        ]
        content = {"images": found, "detection_categories": {"1": "animal"}, "info": {"format_version": "1.4"}}
        (self.folder / name).write_text(json.dumps(content))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Every folder and file that the pages name."""
    make, labels = Maker(tmp_path), list(COLORS)
    box = ("x0", "y0", "x1", "y1")
    traps = [
        (f"S{i // 3:02d}/{i:03d}.png", labels[i % 3], "test" if i % 9 > 6 else "train", f"S{i // 3:02d}") for i in range(120)
    ]
    for name, label, *_ in traps:
        make.image(f"traps/{name}", label)
    make.table("traps/metadata.csv", ("file_name", "label", "split", "site"), traps)
    make.megadetector("megadetector.json", [f"traps/{row[0]}" for row in traps])
    for i in range(3):
        make.image(f"new_photos/{i}.png", labels[i])
        make.image(f"photos/{i}.png", labels[i])
    make.megadetector("new_megadetector.json", [f"new_photos/{i}.png" for i in range(3)])
    for i in range(90):
        make.image(f"fungi/{labels[i % 3]}/{i:03d}.png", labels[i % 3])
    checked = [(f"{i}.png", *make.image(f"checked/{i}.png", labels[i % 3])) for i in range(6)]
    make.table("checked/metadata.csv", ("file_name", *box), checked)
    data = [(f"{i:03d}.png", labels[i % 3], "test" if i >= 90 else "train") for i in range(120)]
    make.table(
        "data/metadata.csv", ("file_name", "label", "split", *box), [(*r, *make.image(f"data/{r[0]}", r[1])) for r in data]
    )
    make.table("map.csv", ("class", "model_class"), [("red", "tabby"), ("green", "beagle"), ("blue", "golden retriever")])
    objects = []
    for i in range(24):
        label, split = labels[i % 3], "train" if i < 15 else "test"
        make.image(f"objects/{i}.png", label, mask=f"objects/masks/{i}.png")
        objects.append((f"{i}.png", label, split, f"masks/{i}.png", f"{label}{i // 3}"))
    make.table("objects/metadata.csv", ("file_name", "label", "split", "mask_file", "object_instance"), objects)
    scenes = [(f"{i}.png", f"scene{i % 3}", "train" if i < 30 else "test") for i in range(45)]
    for name, *_ in scenes:
        make.save(f"scenes/{name}", Image.effect_noise((60, 60), 80).convert("RGB"))
    make.table("scenes/metadata.csv", ("file_name", "label", "split"), scenes)
    shutil.copytree(tmp_path / "data", tmp_path / "demo" / "data")
    renamed = [(*row[:2], row[2].replace("test", "test_swapped"), *make.boxes[f"data/{row[0]}"]) for row in data]
    make.table("demo/data/metadata.csv", ("file_name", "label", "split", *box), renamed)
    boxes = {name: [list(b)] for name, b in make.boxes.items()}
    (tmp_path / "true.json").write_text(json.dumps(boxes))
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(arguments: list[str], tiny) -> list[str]:
    """The same command with networks that are there and quick."""
    name, *rest = arguments
    text = [
        a.replace("google/owlv2-base-patch16-ensemble", str(tiny("owlv2")))
        .replace("IDEA-Research/grounding-dino-tiny", str(tiny("grounding-dino")))
        .replace("vit_small_patch14_reg4_dinov2.lvd142m?size=448", f"{LITE}?size=96")
        .replace("timm:resnet50", f"timm:{LITE}")
        for a in rest
    ]
    if name == "finetune":
        found = text.index("--model") + 1
        parts = text[found].startswith("ifam")
        text[found] = text[found] if parts else "timm:resnet10t"
        text += ["--no-pretrained", "--epochs", "1", *([] if parts else ["--size", "32"])]
    elif name == "localize" and "--localizer" not in text:
        text += ["--localizer", f"owlv2:{tiny('owlv2')}"]
    return [name, *text]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, workspace, tiny, l2r2):
    ran = 0
    for arguments in [*BEFORE.get(page, []), *commands(ROOT / "docs" / page)]:
        if arguments[0] == "demo":  # has tests of its own; its data are there
            continue
        if arguments[0] == "localize":  # the stand-in for pages without this command
            Path(arguments[arguments.index("-o") + 1]).unlink(missing_ok=True)
        result = l2r2(*small(arguments, tiny))
        assert result.returncode == 0, (arguments, result.stdout[-500:], result.stderr[-1500:])
        if arguments[0] == "localize":
            shutil.copy("true.json", arguments[arguments.index("-o") + 1])
        named = [a for flag, a in pairwise(arguments) if flag in ("-o", "--report", "--pictures", "--card")]
        assert not [name for name in named if not os.path.exists(name)], arguments
        ran += 1
    assert ran

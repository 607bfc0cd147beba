"""Make the pictures of the gallery, of the home page and of the README: `python docs/gallery.py [WORK]`.

Everything comes from photographs and digits that scikit-image and scikit-learn ship, and from the demo's run. WORK (default
build/gallery) keeps data and runs, so that a second call only draws.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from l2r2_cli.commands import main
from l2r2_models import ViewSpec, load_image, make_views
from l2r2_models.boxes import read_boxes
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.swap import swapped
from l2r2_models.data.table import read_table

PICTURES = Path(__file__).parent / "pictures"
PHOTOGRAPHS = ("coffee", "chelsea", "astronaut", "rocket")
CUP = (76, 14, 508, 398)  # xyxy pixels of cup and saucer in scikit-image's `coffee`
NCUT = "ncut:timm:tf_efficientnet_lite0.in1k?size=448"
GREEN, GAP = "#16a34a", 8


def l2r2(*arguments: object) -> None:
    """Run the command in this process."""
    sys.argv = ["l2r2", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def views() -> None:
    """What the branches see of one photograph."""
    photograph = Image.fromarray(skimage.data.coffee())
    x0, y0, x1, y1 = CUP
    oval = Image.new("L", photograph.size)
    ImageDraw.Draw(oval).ellipse(CUP, fill=255)
    mask, box = torch.from_numpy(np.asarray(oval) > 0), torch.tensor([[x0, y0, x1, y1]])
    kinds = [
        ("full", {}),
        *(("fg", {"fg_mode": m}) for m in ("crop", "masked_crop", "masked")),
        *(("bg", {"bg": b}) for b in ("shape", "box")),
    ]
    cells = [("image and box", boxed(photograph, CUP))]
    for branch, options in kinds:
        spec = ViewSpec(size=220, **options)
        view = getattr(make_views([photograph], box, spec, branches=(branch,), masks=[mask]), branch)
        cells.append((", ".join([branch, *options.values()]), picture(view[0], spec)))
    sheet(cells, 7, 160).save(PICTURES / "views.jpg", quality=88)


def picture(view: Tensor, spec: ViewSpec) -> Image.Image:
    """A normalized view `[3, S, S]` as an image."""
    pixels = view.permute(1, 2, 0) * torch.tensor(spec.std) + torch.tensor(spec.mean)
    return Image.fromarray((255 * pixels).round().clamp(0, 255).byte().numpy())


def swaps(data: Path) -> None:
    """Objects of the demo's data on their own and on other backgrounds."""
    table = read_table(data).of_split("test_usual")
    rows = tuple({row.label: row for row in table.rows}.values())[:7]
    chosen = type(table)(table.root, rows)
    pairs = [*rows, *swapped(chosen, table).rows]
    cells = [(f"a {row.label}", Image.fromarray(sample_of(row, (124, 116, 104)).pixels.numpy())) for row in pairs]
    sheet(cells, 7, 120).save(PICTURES / "swapped.jpg", quality=88)


def boxes_without_detector(work: Path) -> None:
    """Boxes of `outlier` (upper row) and `ncut` (lower row) on photographs."""
    folder = work / "photographs"
    folder.mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(skimage.data, name)()).convert("RGB").save(folder / f"{name}.png")
    cells = []
    for localizer, file in (("outlier", work / "outlier.json"), (NCUT, work / "ncut.json")):
        l2r2("localize", folder, "--localizer", localizer, "-o", file)
        table = read_boxes(file)
        for path in sorted(folder.glob("*.png")):
            image, entry = load_image(path), table.find(path)
            found = entry.detections((image.height, image.width), path.name).boxes.tolist() if entry else []
            cells.append(("", boxed(image, *found)))
    sheet(cells, len(PHOTOGRAPHS), 280).save(PICTURES / "found_boxes.jpg", quality=85)


def box_report(work: Path) -> None:
    """The sheet of `l2r2 evaluate-boxes`, smaller."""
    l2r2(
        "localize",
        work / "demo" / "data",
        "--split",
        "test_usual",
        "--localizer",
        NCUT.replace("448", "192"),
        "-o",
        work / "digits.json",
    )
    l2r2(
        "evaluate-boxes", work / "digits.json", work / "demo" / "data", "--split", "test_usual", "--pictures", work / "worst.png"
    )
    worst = Image.open(work / "worst.png").convert("RGB")
    worst.resize((900, round(900 * worst.height / worst.width))).save(PICTURES / "worst_boxes.jpg", quality=85)


def figures(work: Path) -> None:
    """The first figures of the report of an evaluation and of an audit."""
    run, data = work / "demo" / "l2r2", work / "demo" / "data"
    l2r2("evaluate", run, data, "--split", "test_swapped", "--report", work / "report.html")
    l2r2("audit", run, data, "--split", "test_usual", "--limit", 60, "--report", work / "audit.html")
    for page, label, name in (("report", "reliability", "reliability"), ("audit", "accuracy in %", "audit")):
        text = (work / f"{page}.html").read_text(encoding="utf-8")
        figure = re.search(rf'<figure role="img" aria-label="{label}.*?(<svg.*?</svg>)', text, re.DOTALL)
        assert figure, page
        svg = figure[1].replace("currentColor", "#555").replace("<svg ", '<svg style="background:#fff" ', 1)
        (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")


def boxed(image: Image.Image, *boxes: tuple[float, ...]) -> Image.Image:
    """A copy with boxes drawn on it."""
    image = image.copy()
    for box in boxes:
        ImageDraw.Draw(image).rectangle(tuple(box), outline=GREEN, width=max(3, image.width // 100))
    return image


def sheet(cells: list[tuple[str, Image.Image]], columns: int, side: int) -> Image.Image:
    """Captioned images in rows, each fitted into a square."""
    caption = 16 if any(words for words, _ in cells) else 0
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + caption + GAP) - GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (words, image) in enumerate(cells):
        scale = side / max(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = i % columns * (side + GAP), i // columns * (side + caption + GAP)
        page.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
        draw.text((left + 2, top + side + 2), words, fill="black")
    return page


if __name__ == "__main__":
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/gallery")
    work.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    views()
    l2r2("demo", "-o", work / "demo")
    Image.open(work / "demo" / "predictions.png").convert("P", palette=Image.Palette.ADAPTIVE).save(
        PICTURES / "predictions.png", optimize=True
    )
    swaps(work / "demo" / "data")
    boxes_without_detector(work)
    box_report(work)
    figures(work)

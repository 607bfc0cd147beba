"""FOD-A (Munyer et al. 2021, arXiv 2110.03072), as the natural background shift of this project's benchmarks (`fod_a_shift`).

Layout of the Pascal VOC release 2.1 (300x300), from the authors' repository FOD-UNOmaha/FOD-data (README, FODtoPASCAL,
FODExpansionTool) and public loaders of it: `VOC2007/JPEGImages/NNNNNN.jpg`, `VOC2007/Annotations/NNNNNN.xml` (object: name,
bndbox), and the conditions of each image in `VOC2007/ImageSets/Main/CategorizationData/FOD_categorization_annotations.csv`
(File; Weather: 0 dry, 1 wet; Light: 0 bright, 1 dim, 2 dark). The release's random split is not used, because it puts neighboring
video frames on both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ...boxes.table import Box
from ...errors import L2R2Error
from ...io import check_readable
from .common import Item, find_root, read_csv, value_of

CONDITIONS = ("dry_bright", "dry_dim", "dry_dark", "wet_dim")
CLASSES = (
    "ClampPart",
    "Cutter",
    "Hammer",
    "Label",
    "LuggageTag",
    "MetalPart",
    "PaintChip",
    "Pliers",
    "Rock",
    "SodaCan",
    "Wire",
    "Wrench",
)
TRAIN, TEST = 60, 30  # frames per class and condition
TABLE = "ImageSets/Main/CategorizationData/FOD_categorization_annotations.csv"


def read_fod_a(folder: Path) -> list[Item]:
    """Read 12 of FOD-A's 31 classes, with boxes; the background is the condition, weather and light.

    Each class has a home condition, shared by three classes. Of a class's frames in a condition, in order, 60 evenly spaced ones
    from the first 70 % are `train` at home and `train_minority` elsewhere; 30 from the last 25 % are `test_id` at home and
    `test_ood` elsewhere. Frames with several objects are skipped.

    Raises:
        L2R2Error: when the folder has another layout, or a file is damaged.
    """
    root = find_root(
        folder,
        "FOD-A in Pascal VOC format",
        ("JPEGImages", "Annotations", TABLE),
        ("VOC2007", "FODPascalVOCFormat-V.2.1/VOC2007"),
    )
    frames: dict[tuple[str, str], list[tuple[str, Box]]] = defaultdict(list)
    for stem, condition in sorted(_conditions(root / TABLE).items()):
        if condition in CONDITIONS and (found := _object(root / "Annotations" / f"{stem}.xml")) and found[0] in CLASSES:
            frames[found[0], condition].append((stem, found[1]))
    items = []
    for number, label in enumerate(CLASSES):
        home = CONDITIONS[number % len(CONDITIONS)]
        for condition in CONDITIONS:
            first, last = first_and_last(frames[label, condition])
            at_home = condition == home
            for split, part in (("train" if at_home else "train_minority", first), ("test_id" if at_home else "test_ood", last)):
                for stem, box in part:
                    columns = {"label": label, "split": split, "background": condition, "home_background": home}
                    items.append(Item(root / "JPEGImages" / f"{stem}.jpg", f"{stem}.jpg", columns, box))
    if not items:
        raise L2R2Error(f"{root}: has no frame of {CLASSES[0]}, {CLASSES[1]}, ... with one object; unpack the whole archive.")
    return items


def first_and_last(frames: Sequence[tuple[str, Box]]) -> tuple[list[tuple[str, Box]], list[tuple[str, Box]]]:
    """Evenly spaced frames of the first 70 % and of the last 25 %."""
    first, last = frames[: int(0.7 * len(frames))], frames[int(0.75 * len(frames)) :]
    return _even(first, TRAIN), _even(last, TEST)


def _even(frames: Sequence[tuple[str, Box]], count: int) -> list[tuple[str, Box]]:
    return [frames[i * len(frames) // count] for i in range(count)] if len(frames) > count else list(frames)


def _conditions(file: Path) -> dict[str, str]:
    weather, light = {"0": "dry", "1": "wet"}, {"0": "bright", "1": "dim", "2": "dark"}
    return {
        Path(row["File"]).stem: "_".join(
            (value_of(weather, row["Weather"], file, "Weather"), value_of(light, row["Light"], file, "Light"))
        )
        for row in read_csv(file, ("File", "Weather", "Light"))
    }


def _object(file: Path) -> tuple[str, Box] | None:
    """Class and box of a frame's only object; None if there are several."""
    check_readable(file)
    try:
        objects = ElementTree.parse(file).getroot().findall("object")
        if len(objects) != 1:
            return None
        x0, y0, x1, y1 = (float(objects[0].findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax"))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise L2R2Error(f"{file}: cannot be read as a Pascal VOC annotation ({error}).") from error
    return (objects[0].findtext("name") or "").strip(), (x0, y0, x1, y1)

"""Composites of cut-out objects on photographed scenes that predict the class in training and are misleading in the test.

This is the one-to-one protocol of Spawrious (Lynch et al. 2023, section 3) with real pixels of other data sets: each class has a
home scene, on which its training images are pasted with a different probability in each of two environments; in the test, the
scenes are permuted among the classes.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..images import FILL, image_tensor, load_image
from ..io import read_json, write_atomic, write_json, write_text
from .composite import cover, object_alpha
from .dataset import sample_of
from .table import ImageTable, Row, read_table, rows_digest

ABOUT, METADATA = "composites.json", "metadata.csv"
COLUMNS = (
    "file_name",
    "label",
    "split",
    "x0",
    "y0",
    "x1",
    "y1",
    "mask_file",
    "background",
    "environment",
    "object",
    "object_file",
    "scene_file",
)
LONG_SIDE = (0.35, 0.75)  # range of an object's longer side relative to the image; independent of the class, like its position
VAL_SCENES = 0.15  # share of each kind's training scenes that is used only for validation


@dataclass(frozen=True)
class Composite:
    """One image to create.

    Attributes:
        name: file name without suffix.
        split: its split.
        environment: its environment, such as `97%`.
        photo: the photograph of the object.
        object: the physical object.
        scene: the photograph of the scene.
    """

    name: str
    split: str
    environment: str
    photo: Row
    object: str
    scene: Row


def composites(
    objects: str | Path,
    scenes: str | Path,
    out: str | Path,
    *,
    correlation: Sequence[float] = (0.97, 0.87),
    size: int = 128,
    copies: int = 1,
    val_objects: int = 1,
    object_column: str = "object_instance",
    seed: int = 0,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda steps, _: steps,
) -> Path:
    """Write composites as an imagefolder with images/, masks/ and metadata.csv; an interrupted call is resumed.

    The splits are `train`, `val` (other physical objects on other scene photographs, with the same correlations), `test_id` (test
    objects on their home scene) and `test_ood` (on the home scene of another class). Home scenes are assigned at random, as
    evenly as the numbers of classes and kinds of scenes allow.

    Args:
        objects: a data set (see `read_table`) with labels, masks, splits `train` and `test`, and a column of the physical object.
        scenes: a data set with the kind of scene as label, and splits `train` and `test`.
        out: a new folder, or that of an interrupted call.
        correlation: for each training environment, the exact share of a class's images on its home scene; the others are spread
            evenly over other scenes. Every training photograph occurs in each environment.
        size: side of the images in pixels.
        copies: number of composites per photograph, in each environment or test split.
        val_objects: number of physical objects per class that are held out for `val`; 0 omits that split.
        object_column: the objects' metadata column that names the physical object.
        seed: random seed.
        progress: wraps the images while they are written.

    Returns:
        `out`.

    Raises:
        L2R2Error: when the data are not suitable, a setting is out of range, or `out` contains something else.
    """
    out = Path(out)
    settings: dict[str, Any] = dict(size=size, copies=copies, val_objects=val_objects, object_column=object_column, seed=seed)
    settings["correlation"] = [float(p) for p in correlation]
    _check_settings(settings)
    object_table, scene_table = read_table(objects), read_table(scenes)
    about = {"settings": settings, "objects": rows_digest(object_table), "scenes": rows_digest(scene_table)}
    plan = _plan(object_table, scene_table, settings)
    _check_out(out, about)
    if (out / METADATA).is_file():
        return out
    write_json(out / ABOUT, about)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in progress(plan, len(plan)):
        box = _make(item, out, size, seed)
        files = [
            path.relative_to(table.root).as_posix()
            for path, table in ((item.photo.path, object_table), (item.scene.path, scene_table))
        ]
        mask = f"masks/{item.name}.png"
        where = (item.scene.label, item.environment, item.object, *files)
        writer.writerow([f"images/{item.name}.png", item.photo.label, item.split, *box, mask, *where])
    write_text(out / METADATA, lines.getvalue())  # written last, so it marks the data set as complete
    return out


def _check_settings(settings: dict[str, Any]) -> None:
    if not settings["correlation"] or not all(0 <= p <= 1 for p in settings["correlation"]):
        raise L2R2Error("correlation must be one or more numbers between 0 and 1, e.g. 0.97,0.87.")
    if len(set(settings["correlation"])) < len(settings["correlation"]):
        raise L2R2Error("correlation must be distinct numbers, one per environment; for more images of one, set copies.")
    for name, low, high in (("size", 16, 4096), ("copies", 1, 1000), ("val_objects", 0, 1000), ("seed", 0, 2**32 - 1)):
        if not low <= settings[name] <= high:
            raise L2R2Error(f"{name} must lie between {low} and {high}, got {settings[name]}.")


def _check_out(out: Path, about: dict[str, Any]) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / ABOUT).is_file():
        raise L2R2Error(f"{out}: already exists and contains no composites; choose another -o.")
    if read_json(out / ABOUT) != about:
        raise L2R2Error(f"{out}: contains composites of other data or settings; choose another -o.")


def _plan(objects: ImageTable, scenes: ImageTable, settings: dict[str, Any]) -> list[Composite]:
    """Assign photographs to scenes, in the order of the metadata."""
    draw = random.Random(f"plan {settings['seed']}")
    train, val = _hold_objects_out(objects.of_split("train"), settings["object_column"], settings["val_objects"], draw)
    test = objects.of_split("test")
    for row in (*train.rows, *test.rows):
        if row.mask_file is None:
            raise L2R2Error(f"{objects.root}: {row.path.name} has no mask_file; composites need a mask for each object.")
    classes = objects.classes()
    kinds = scenes.of_split("train").classes()
    if missing := set(kinds) - set(scenes.of_split("test").label_counts()):
        raise L2R2Error(f"{scenes.root}: there is no test scene of the kind {min(missing)}; add one, or remove that kind.")
    near, held = _by_kind(scenes.of_split("train"), draw)
    far = _by_kind(scenes.of_split("test"), draw, held_out=0.0)[0]
    home, away = _homes(classes, kinds, draw)
    copies, column, plan = settings["copies"], settings["object_column"], []
    for p in settings["correlation"]:
        for split, table, places in (("train", train, near), ("val", val, held)):
            plan += _environment(split, f"{100 * p:g}%", table, column, copies, places, home, p, draw)
    for split, to in (("test_id", home), ("test_ood", away)):
        plan += _environment(split, split.removeprefix("test_"), test, column, copies, far, to, 1.0, draw)
    return sorted(plan, key=lambda item: ("train", "val", "test_id", "test_ood").index(item.split))


def _homes(classes: Sequence[str], kinds: Sequence[str], draw: random.Random) -> tuple[dict[str, str], dict[str, str]]:
    """Draw the home scene of each class, and its scene in `test_ood`, which is the home scene of another class."""
    order = draw.sample(list(kinds), len(kinds))
    used = order[: len(classes)]
    home = {label: used[i % len(used)] for i, label in enumerate(draw.sample(list(classes), len(classes)))}
    after = dict(zip(used, (*used[1:], used[0])))
    return home, {label: after[kind] for label, kind in home.items()}


def _environment(
    split: str,
    environment: str,
    photos: ImageTable,
    column: str,
    copies: int,
    scenes: dict[str, list[Row]],
    home: dict[str, str],
    correlation: float,
    draw: random.Random,
) -> list[Composite]:
    """Plan `copies` composites per photograph, with the fraction `correlation` of each class on its home scene."""
    made = []
    names = photos.column(column) if len(photos) else []
    for label in sorted(photos.label_counts()):
        mine = [(row, name) for row, name in zip(photos.rows, names) if row.label == label for _ in range(copies)]
        others = [kind for kind in scenes if kind != home[label]]
        at_home = [True] * round(correlation * len(mine)) + [False] * (len(mine) - round(correlation * len(mine)))
        draw.shuffle(at_home)
        for i, ((row, name), usual) in enumerate(zip(mine, at_home)):
            kind = home[label] if usual else draw.choice(others)
            file = f"{split}_{environment.rstrip('%')}_{label}_{i:04d}".replace("/", "_")
            made.append(Composite(file, split, environment, row, name, draw.choice(scenes[kind])))
    return made


def _hold_objects_out(train: ImageTable, column: str, count: int, draw: random.Random) -> tuple[ImageTable, ImageTable]:
    """Split the training photographs into those to train on, and those of `count` held-out physical objects per class."""
    names = train.column(column)
    held: set[str] = set()
    for label in train.classes():
        mine = sorted({name for row, name in zip(train.rows, names) if row.label == label})
        if count >= len(mine):
            raise L2R2Error(f"{train.root}: {label} has only {len(mine)} training objects, too few to hold {count} out for val.")
        held.update(draw.sample(mine, count))
    parts = [tuple(row for row, name in zip(train.rows, names) if (name in held) == side) for side in (False, True)]
    return replace(train, rows=parts[0]), replace(train, rows=parts[1])


def _by_kind(
    scenes: ImageTable, draw: random.Random, held_out: float = VAL_SCENES
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the scenes by kind, and those held out for validation; a kind with a single scene uses it for both."""
    stay: dict[str, list[Row]] = {}
    held: dict[str, list[Row]] = {}
    for kind in sorted(scenes.label_counts()):
        rows = [row for row in scenes.rows if row.label == kind]
        draw.shuffle(rows)
        count = max(1, round(held_out * len(rows)))
        stay[kind], held[kind] = (rows[count:], rows[:count]) if held_out and len(rows) > 1 else (rows, rows)
    return stay, held


def _make(item: Composite, out: Path, size: int, seed: int) -> tuple[int, ...]:
    """Write one image and its mask, and return the object's box."""
    image, mask = out / "images" / f"{item.name}.png", out / "masks" / f"{item.name}.png"
    pixels, shown = _compose(item, size, random.Random(f"place {seed} {item.name}"))
    for file, content in ((image, pixels), (mask, shown.to(torch.uint8) * 255)):
        if not file.is_file():  # writes are atomic, so an existing file is complete
            write_atomic(file, _Png(content))
    return tuple(int(v) for v in Detections.from_mask(shown).boxes[0].tolist())


@dataclass(frozen=True)
class _Png:
    pixels: Tensor

    def __call__(self, path: Path) -> None:
        Image.fromarray(self.pixels.numpy()).save(path, "PNG")


def _compose(item: Composite, size: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Return the pixels `[size, size, 3]` of the composite, and the object's mask `[size, size]` bool."""
    sample = sample_of(item.photo, FILL)
    if sample.mask is None or not sample.mask.any():
        raise L2R2Error(f"{item.photo.path}: its mask is empty; fix the mask, or remove the image.")
    x0, y0, x1, y1 = (int(v) for v in Detections.from_mask(sample.mask).boxes[0].tolist())
    alpha = object_alpha(sample.mask.shape, sample.box, sample.mask)[y0:y1, x0:x1]
    scale = draw.uniform(*LONG_SIDE) * size / max(x1 - x0, y1 - y0)
    height, width = (max(1, round(scale * side)) for side in (y1 - y0, x1 - x0))
    # colors are premultiplied before resizing, so that the original background does not bleed in at the edge
    layers = torch.cat([alpha[None], alpha * sample.pixels[y0:y1, x0:x1].permute(2, 0, 1).float()])
    layers = F.interpolate(layers[None], (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    y, x = draw.randint(0, size - height), draw.randint(0, size - width)
    canvas = cover(image_tensor(load_image(item.scene.path)), (size, size)).float()
    weight = torch.zeros(size, size, 1)
    weight[y : y + height, x : x + width] = layers[..., :1]
    canvas = (1 - weight) * canvas
    canvas[y : y + height, x : x + width] += layers[..., 1:]
    shown = weight[..., 0] > 0.5
    return canvas.round().clamp(0, 255).to(torch.uint8), shown if shown.any() else weight[..., 0] > 0

"""ETH-80 (Leibe and Schiele, CVPR 2003): 80 objects of 8 classes, each from 41 views, with masks; for `l2r2 composite`.

Layout, from public loaders of the archive `eth80-cropped256`: one folder per object, `apple1/` to `tomato10/`, with
`apple1-000-000.png` (tilt and turn in degrees), and `maps/` with the mask of each view, whose file name starts with that of the
view. The cars have the numbers 1, 2, 3, 5, 6, 7, 9, 11, 12 and 14.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...errors import L2R2Error
from ...images import load_image
from .common import Item, find_root, folders_in, images_in

OBJECT = re.compile(r"(apple|car|cow|cup|dog|horse|pear|tomato)(\d+)")
CARS = {11: 4, 12: 8, 14: 10}  # renumbered to fill the gaps
TRAIN = 7  # training objects per class; the others are for testing


def read_eth80(folder: Path) -> list[Item]:
    """Read every other view of ETH-80 in the order of file names (21 of 41), as in this project's benchmarks.

    The label is the class, the splits are train (objects 1 to 7) and test (8 to 10), and the column is object_instance. There are
    masks.

    Raises:
        L2R2Error: when the folder has another layout, or a mask is missing.
    """
    root = find_root(folder, "ETH-80", ("apple1", "apple1/maps"), ("eth80-cropped256",))
    items = []
    for place in folders_in(root):
        if (found := OBJECT.fullmatch(place.name)) is None:
            continue
        label, number = found[1], int(found[2])
        number = CARS.get(number, number) if label == "car" else number
        columns = {"label": label, "split": "train" if number <= TRAIN else "test", "object_instance": f"{label}_{number}"}
        outlines = images_in(place / "maps")
        for path in images_in(place)[::2]:
            mask = next((outline for outline in outlines if outline.stem.startswith(path.stem)), None)
            if mask is None:
                raise L2R2Error(f"{path}: has no mask in {place / 'maps'}; unpack the whole archive.")
            items.append(Item(path, path.name, columns, mask=mask, read_mask=_outline))
    return items


def _outline(file: Path) -> np.ndarray:
    """The object's mask, whether it is drawn in black or white: an object never covers most of the image's edge."""
    bright = np.asarray(load_image(file).convert("L")) > 127
    edge = np.concatenate([bright[0], bright[-1], bright[:, 0], bright[:, -1]])
    mask: np.ndarray = bright != (edge.mean() > 0.5)
    return mask

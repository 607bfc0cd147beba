"""Photos for the network of `explain_cases`, in which full sees the ground and fg what is in the box."""

from pathlib import Path

import numpy as np
from audit_cases import GROUNDS, OBJECTS
from PIL import Image

BOXES = {"red": (20.0, 30.0, 80.0, 90.0), "blue": (140.0, 60.0, 200.0, 120.0)}


def photo(ground="green", size=(160, 240)):
    """A red and a blue object on a ground."""
    pixels = np.empty((*size, 3), np.uint8)
    pixels[:] = GROUNDS[ground]
    for name, (x0, y0, x1, y1) in BOXES.items():
        pixels[int(y0) : int(y1), int(x0) : int(x1)] = OBJECTS[name]
    return Image.fromarray(pixels)


def write_backgrounds(folder: Path) -> Path:
    """One plain image for each ground, in the order of their names: blue, green, red."""
    folder.mkdir()
    for name, color in GROUNDS.items():
        Image.new("RGB", (300, 100), color).save(folder / f"{name}.png")
    return folder

"""A demo data set, generated from real pixels: handwritten digits on photographs, both from installed packages.

Each image shows a card with a digit on a photograph, and each class has a home photograph. In `train` and `test_usual`, most
cards lie on the home photograph of their class, in `test_swapped` on that of another class. `val` is like `train`, with other
digits. The digits and photograph regions of the test rows do not occur in training or validation. Position, size and colors of a
card are independent of its class, and its box is known.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import L2R2Error
from ..io import write_text

PHOTOGRAPHS = ("coffee", "grass", "brick", "gravel", "rocket", "retina", "china", "flower", "immunohistochemistry", "chelsea")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 96  # of an image, in pixels
AT_HOME = 0.97  # share of training digits on their home photograph
COLUMNS = ("file_name", "label", "split", "x0", "y0", "x1", "y1", "background")


def make_demo_data(folder: str | Path, *, train: int = 600, val: int = 150, test: int = 300, seed: int = 0) -> Path:
    """Write the data set as an imagefolder with metadata.csv.

    Args:
        folder: the folder to write to; the images go into `folder/images`.
        train: number of images in `train`.
        val: number of images in `val`.
        test: number of images in each of `test_usual` and `test_swapped`.
        seed: random seed.

    Returns:
        `folder`.

    Raises:
        L2R2Error: when scikit-learn or scikit-image is missing.

    >>> make_demo_data("digits", train=60, val=20, test=30)  # doctest: +SKIP
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ink, labels = _digits()
    order = rng.permutation(len(ink))
    shares = (len(order) // 2, len(order) * 2 // 3)
    seen, other, held_out = order[: shares[0]], order[shares[0] : shares[1]], order[shares[1] :]
    photographs = [_photograph(name) for name in PHOTOGRAPHS]
    rows = []
    for split, count, pool, at_home in (
        ("train", train, seen, AT_HOME),
        ("val", val, other, AT_HOME),
        ("test_usual", test, held_out, AT_HOME),
        ("test_swapped", test, held_out, 0.0),
    ):
        for i, digit in enumerate(rng.choice(pool, count, replace=count > len(pool))):
            label = int(labels[digit])
            where = label if rng.random() < at_home else (label + int(rng.integers(1, len(PHOTOGRAPHS)))) % len(PHOTOGRAPHS)
            image = _region(photographs[where], not split.startswith("test"), rng)
            box = _paste(image, ink[digit], rng)
            name = f"images/{split}_{i:04d}.png"
            Image.fromarray(image).save(folder / name)
            rows.append((name, DIGITS[label], split, *box, PHOTOGRAPHS[where]))
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(folder / "metadata.csv", lines.getvalue())  # written last, so it marks the data set as complete
    return folder


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Intensities `[N, 8, 8]` in [0, 1] and labels of scikit-learn's handwritten digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise L2R2Error('The demo needs more packages: pip install "l2r2-models[demo]".') from error
    digits = load_digits()
    return digits.images / 16.0, digits.target


def _photograph(name: str) -> np.ndarray:
    """An RGB photograph from scikit-learn (china, flower) or scikit-image, 250 pixels high."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        try:
            import skimage.data
        except ImportError as error:
            raise L2R2Error('The demo needs more packages: pip install "l2r2-models[demo]".') from error
        pixels = getattr(skimage.data, name)()
    image = Image.fromarray(pixels).convert("RGB")
    return np.asarray(image.resize((round(250 * image.width / image.height), 250), Image.Resampling.LANCZOS))


def _region(photograph: np.ndarray, training: bool, rng: np.random.Generator) -> np.ndarray:
    """A random square of the photograph, from its left 60 % for training or its right 40 % for testing."""
    border = round(0.6 * photograph.shape[1])
    part = photograph[:, :border] if training else photograph[:, border:]
    side = min(SIDE, part.shape[1])
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in part.shape[:2])
    return np.array(Image.fromarray(part[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _paste(image: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the digit into the image in place, on a card with random paper and ink colors; return the card's box."""
    side = int(rng.integers(28, 45))
    glyph = Image.fromarray((255 * ink).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    opacity = np.asarray(glyph, dtype=np.float64)[:, :, None] / 255
    paper, pen = rng.integers(150, 256, 3), rng.integers(0, 110, 3)
    y, x = (int(v) for v in rng.integers(0, SIDE - side + 1, 2))
    image[y : y + side, x : x + side] = np.rint(paper * (1 - opacity) + pen * opacity).astype(np.uint8)
    return x, y, x + side, y + side

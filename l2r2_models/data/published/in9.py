"""ImageNet-9 and its Backgrounds Challenge (Xiao et al. 2021, Noise or Signal): nine classes on swapped backgrounds.

Layout, from the authors' repository MadryLab/backgrounds_challenge (README, in9_eval.py, challenge_eval.py): the release
`bg_challenge/` has one folder per variation with `val/NN_class/*.JPEG`, and `fg_mask/val/NN_class/*.npy`, arrays `[H, W]` that
are 1 on the object of the image of that name in `original`. Training sets are separate archives (`in9l/`, `original/`,
`mixed_rand/`, ...) with `train/` and `val/`. Mixed images are named fg_ID_bg_ID.JPEG, with the ImageNet ids of the photos that
object and background come from; the object keeps its position.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...errors import L2R2Error
from .common import Item, find_root, folders_in, images_in

WITH_OBJECT = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg")
VARIATIONS = (*WITH_OBJECT, "no_fg", "only_bg_b", "only_bg_t")
OBJECT, BACKGROUND = re.compile(r"(?:fg_)?(n\d+_\d+)"), re.compile(r"_bg_(n\d+)_")


def read_in9(folder: Path, training: Path | None = None) -> list[Item]:
    """Read the items of ImageNet-9.

    The label is one of nine classes, the splits are test_VARIATION, and the background is the class that a mixed image's
    background comes from. Variations that show the object have masks if `fg_mask/` exists.

    Args:
        folder: the unpacked release.
        training: one of the training archives, which adds the splits train and val.

    Raises:
        L2R2Error: when a folder has another layout.
    """
    root = find_root(folder, "the Backgrounds Challenge", ("original/val", "mixed_rand/val", "mixed_same/val"), ("bg_challenge",))
    classes = {path.name.split("_")[0]: label for label, path in _images(root / "original/val")}  # ImageNet's id: our class
    items = []
    for variation in VARIATIONS:
        for label, path in _images(root / variation / "val"):
            found = BACKGROUND.search(path.name)
            background = classes.get(found[1], "") if found else label if variation == "original" else ""
            columns = {"label": label, "split": f"test_{variation}", "background": background}
            mask = _mask(root, path) if variation in WITH_OBJECT else None
            items.append(Item(path, path.relative_to(root).as_posix(), columns, mask=mask, read_mask=_read_mask))
    if training is not None:
        base = find_root(training, "an ImageNet-9 training set", ("train", "val"), ("in9l",))
        for split in ("train", "val"):
            for label, path in _images(base / split):
                name = f"{base.name}/{path.relative_to(base).as_posix()}"
                items.append(Item(path, f"training/{name}", {"label": label, "split": split, "background": ""}))
    return items


def _images(folder: Path) -> list[tuple[str, Path]]:
    """Labels and files; the folder `02_wheeled vehicle` has the label "wheeled vehicle"."""
    return [(place.name.partition("_")[2] or place.name, path) for place in folders_in(folder) for path in images_in(place)]


def _mask(root: Path, image: Path) -> Path | None:
    found = OBJECT.match(image.name)
    mask = root / "fg_mask/val" / image.parent.name / f"{found[1]}.npy" if found else None
    return mask if mask is not None and mask.is_file() else None


def _read_mask(file: Path) -> np.ndarray:
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise L2R2Error(f"{file}: is not a NumPy array ({error}).") from error
    if values.ndim != 2:
        raise L2R2Error(f"{file}: is a mask of shape {values.shape}, but must be [height, width].")
    mask: np.ndarray = values > 0
    return mask

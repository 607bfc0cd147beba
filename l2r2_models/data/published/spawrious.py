"""Spawrious (Lynch et al. 2023, arXiv 2303.05470): generated photos of four dog breeds at six locations, six challenges.

Layout and combinations, from the authors' repository aengusl/spawrious (spawrious/torch.py): `spawrious224/GROUP/LOCATION/BREED/
*.png` with the groups 0 and 1. In one-to-one challenges, environment g trains on the images of group g: for each breed, 97 %
(g = 0) or 87 % (g = 1) of 3,168 from its own location, and the rest from a location that all breeds share. The test images are
from both groups, at the location of another breed. Many-to-many challenges use only group 0, and breeds share locations in pairs.
The authors take the first files in the order of the file system; here it is the order of the names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import L2R2Error
from .common import Item, find_root, images_in

BREEDS = ("bulldog", "dachshund", "labrador", "corgi")  # the order of the locations below
TOTAL = 3168  # training images per breed and environment
AT_HOME = (int(0.97 * TOTAL), int(0.87 * TOTAL))
ONE_TO_ONE = {  # locations for training, for testing, and the one that all breeds share
    "easy": ("desert jungle dirt snow", "dirt snow desert jungle", "beach"),
    "medium": ("mountain beach dirt jungle", "jungle dirt beach snow", "desert"),
    "hard": ("jungle mountain snow desert", "mountain snow desert jungle", "beach"),
}
MANY_TO_MANY = {  # locations for training and for testing; each pair of breeds has a pair of locations
    "easy": ("desert mountain dirt jungle", "dirt jungle mountain desert"),
    "medium": ("beach snow mountain desert", "desert mountain beach snow"),
    "hard": ("dirt jungle snow beach", "snow beach dirt jungle"),
}


def read_spawrious(challenge: str, folder: Path) -> list[Item]:
    """Read the items of one Spawrious challenge.

    The label is the breed, the background is the location, the splits are train and test, and the column is group.

    Args:
        challenge: such as `o2o-easy`.
        folder: the unpacked archive.

    Raises:
        L2R2Error: when the folder has another layout, or lacks images of this challenge.
    """
    root = find_root(folder, "Spawrious", ("0",), ("spawrious224",))
    kind, level = challenge.split("-")
    take = partial(_take, root)
    return _one_to_one(take, level) if kind == "o2o" else _many_to_many(take, level)


def _one_to_one(take: partial[list[Item]], level: str) -> list[Item]:
    train, test, shared = (names.split() for names in ONE_TO_ONE[level])
    items = []
    for group, count in enumerate(AT_HOME):
        for breed, home in zip(BREEDS, train):
            items += take(group, home, breed, "train", count) + take(group, shared[0], breed, "train", TOTAL - count)
    for group in range(2):
        for breed, away in zip(BREEDS, test):
            items += take(group, away, breed, "test")
    return items


def _many_to_many(take: partial[list[Item]], level: str) -> list[Item]:
    items = []
    for split, names in zip(("train", "test"), MANY_TO_MANY[level]):
        places = names.split()
        for breed, pair in zip(BREEDS, (places[:2], places[:2], places[2:], places[2:])):
            for place in pair:
                items += take(0, place, breed, split, TOTAL if split == "train" else None)
    return items


def _take(root: Path, group: int, location: str, breed: str, split: str, count: int | None = None) -> list[Item]:
    folder = root / str(group) / location / breed
    if not (images := images_in(folder)):
        raise L2R2Error(f"{folder}: has no images, which this challenge needs; unpack the archive of this challenge.")
    columns = {"label": breed, "split": split, "background": location, "group": str(group)}
    return [Item(path, path.relative_to(root).as_posix(), columns) for path in images[:count]]

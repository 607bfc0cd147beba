"""MetaShift, cats and dogs by context (Liang and Zou 2022, arXiv 2202.06523): photos of Visual Genome.

Layout, from the authors' repository Weixin-Liang/MetaShift (dataset/subpopulation_shift_cat_dog_indoor_outdoor.py and
domain_generalization_cat_dog.py, whose `copy_image_for_subject` writes the folders) and SubpopBench, which uses the archive:
`train/` and `test/` (or `val_out_of_domain/`) contain `cat/` and `dog/`, with one folder per context, e.g.
`train/cat/cat(indoor)/ID.jpg`. The script's mixed variant has no folders of contexts; it stores them in a pickle, which is not
read.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import L2R2Error
from .common import Item, find_root, folders_in, images_in

BELOW = ("MetaShift-Cat-Dog-indoor-outdoor", "Domain-Generalization-Cat-Dog")
SPLITS = {"train": "train", "test": "test", "val_out_of_domain": "test"}
CONTEXT = re.compile(r"(.+)\((.+)\)")


def read_metashift(folder: Path) -> list[Item]:
    """Read the items of MetaShift.

    The label is cat or dog. The background is the context, or several joined by + for a photo that is in several folders.

    Raises:
        L2R2Error: when the folder has another layout.
    """
    root = find_root(folder, "MetaShift's cats and dogs", ("train/cat", "train/dog"), BELOW)
    items: dict[tuple[str, str, str], Item] = {}
    for part, split in SPLITS.items():
        for subject in folders_in(root / part):
            for place in folders_in(subject):
                if found := CONTEXT.fullmatch(place.name):
                    for path in images_in(place):
                        _add(items, path, root, subject.name, split, found[2])
    if not items:
        raise L2R2Error(
            f"{root}: has no folders of contexts like train/cat/cat(indoor); use MetaShift-Cat-Dog-indoor-outdoor, because the "
            "mixed variant stores its contexts in a pickle, which is not read."
        )
    return list(items.values())


def _add(items: dict[tuple[str, str, str], Item], path: Path, root: Path, label: str, split: str, context: str) -> None:
    """Add an image, or if it was added before, only its other context."""
    key = (split, label, path.name)
    if key in items:
        items[key].columns["background"] += f"+{context}"
    else:
        columns = {"label": label, "split": split, "background": context}
        items[key] = Item(path, path.relative_to(root).as_posix(), columns)

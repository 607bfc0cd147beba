"""CounterAnimal (Wang et al. 2024): ImageNet's animals on common and on unusual backgrounds, for testing only.

Source: "A Sober Look at the Robustness of CLIPs to Spurious Features".

Layout, from public loaders of the set: `LAION-final/ID NAME/common-BACKGROUND/` and `.../counter-BACKGROUND/` with the images,
where ID is the number of ImageNet's class, e.g. `10 brambling/common-grass`. No boxes.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import L2R2Error
from .common import Item, folders_in, images_in

SPLITS = {"common": "test_common", "counter": "test_counter"}


def read_counteranimal(folder: Path) -> list[Item]:
    """Read the items of CounterAnimal.

    The label is the animal, the splits are test_common and test_counter, and the columns are background and imagenet_class (0 to
    999).

    Raises:
        L2R2Error: when the folder has another layout.
    """
    root = folder / "LAION-final" if (folder / "LAION-final").is_dir() else folder
    items = []
    for place in folders_in(root):
        number, _, label = place.name.partition(" ")
        if not (number.isdecimal() and label):
            continue
        for group in folders_in(place):
            kind, _, background = group.name.partition("-")
            if kind in SPLITS:
                columns = {"label": label, "split": SPLITS[kind], "background": background, "imagenet_class": number}
                items += [Item(path, path.relative_to(root).as_posix(), columns) for path in images_in(group)]
    if not items:
        raise L2R2Error(
            f"{folder}: is not CounterAnimal; looked for images in folders like 10 brambling/common-grass in it or LAION-final."
        )
    return items

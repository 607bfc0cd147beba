"""UrbanCars (Li et al. 2023, A Whac-A-Mole Dilemma): cars pasted on urban or country backgrounds with a co-occurring object.

Layout, from the authors' repository facebookresearch/Whac-A-Mole (create_datasets/urbancars/gen_urbancars.py, dataset/
urbancars.py): `bg-0.95_co_occur_obj-0.95/train/` and `bg-0.5_co_occur_obj-0.5/{val,test}/` contain folders
`obj-A_bg-B_co_occur_obj-C/`, where A, B and C are urban or country, with `000.jpg`, its car's mask `000_mask.png` and
`000_co_occur_obj_mask.png`.
"""

from __future__ import annotations

import re
from pathlib import Path

from .common import Item, find_root, folders_in, images_in

PARTS = {
    "train": "bg-0.95_co_occur_obj-0.95/train",
    "val": "bg-0.5_co_occur_obj-0.5/val",
    "test": "bg-0.5_co_occur_obj-0.5/test",
}
GROUP = re.compile(r"obj-(\w+)_bg-(\w+)_co_occur_obj-(\w+)")


def read_urbancars(folder: Path) -> list[Item]:
    """Read the items of UrbanCars.

    The label is the kind of car, urban or country; the columns are background and co_occurring_object. There are masks of cars.

    Raises:
        L2R2Error: when the folder has another layout.
    """
    root = find_root(folder, "UrbanCars", tuple(PARTS.values()), ("urbancars", "urbancars_images"))
    items = []
    for split, part in PARTS.items():
        for place in folders_in(root / part):
            if found := GROUP.fullmatch(place.name):
                columns = {"label": found[1], "split": split, "background": found[2], "co_occurring_object": found[3]}
                for path in images_in(place):
                    if path.suffix == ".jpg":  # the masks are PNG
                        mask = path.with_name(f"{path.stem}_mask.png")
                        items.append(Item(path, f"{split}/{place.name}/{path.name}", columns, mask=mask))
    return items

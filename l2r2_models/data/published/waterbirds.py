"""Waterbirds (Sagawa et al. 2020, Distributionally Robust Neural Networks): birds of CUB pasted on land and water of Places.

Layout, from the authors' repository kohpangwei/group_DRO (README, dataset_scripts/generate_waterbirds.py) and the WILDS package:
`waterbird_complete95_forest2water2/` with `metadata.csv` (img_id, img_filename, y: 1 for waterbirds, split: 0 train, 1 val,
2 test, place: 1 for water, place_filename) and the images at `img_filename`. Size and position of the bird are those of CUB's
photo (only the background is cropped and resized), so CUB's boxes and segmentations apply.
"""

from __future__ import annotations

from pathlib import Path

from .common import Item, find_root, read_csv, relative, value_of
from .cub import boxes_of, cub_root, mask_of, masks_folder, species

SPLITS = {"0": "train", "1": "val", "2": "test"}


def read_waterbirds(folder: Path, cub: Path | None = None) -> list[Item]:
    """Read the items of Waterbirds.

    The label is landbird or waterbird, the background is land or water, and the column is species.

    Args:
        folder: the unpacked archive.
        cub: the folder of CUB-200-2011, which provides boxes and masks.

    Raises:
        L2R2Error: when a folder has another layout, or a table is damaged.
    """
    below = ("waterbird_complete95_forest2water2", "waterbirds_v1.0")
    root = find_root(folder, "Waterbirds", ("metadata.csv",), below)
    file = root / "metadata.csv"
    cub = None if cub is None else cub_root(cub)
    boxes, masks = ({}, None) if cub is None else (boxes_of(cub), masks_folder(cub))
    items = []
    for row in read_csv(file, ("img_filename", "y", "split", "place")):
        name = relative(row["img_filename"], file)
        columns = {
            "label": value_of({"0": "landbird", "1": "waterbird"}, row["y"], file, "y"),
            "split": value_of(SPLITS, row["split"], file, "split"),
            "background": value_of({"0": "land", "1": "water"}, row["place"], file, "place"),
            "species": species(name.split("/")[0]),
        }
        items.append(Item(root / name, name, columns, boxes.get(name), mask_of(masks, name)))
    return items

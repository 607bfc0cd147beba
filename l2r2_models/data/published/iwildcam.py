"""iWildCam 2020 as in WILDS (Koh et al. 2021; Beery et al. 2020, arXiv 2004.10340): camera traps, split by trap.

Layout, from the package p-lambda/wilds (wilds/datasets/iwildcam_dataset.py, dataset_preprocessing/iwildcam/create_split.py):
`iwildcam_v2.0/` with all images in `train/`, `metadata.csv` (split: train, val, test, id_val, id_test; location_remapped,
sequence_remapped, y, datetime, filename, ...), and `categories.csv` (y, category_id, name). val and test are from other traps
than train, id_val and id_test from the same ones on other days. There are no boxes; pass MegaDetector's results as `--boxes`.
"""

from __future__ import annotations

from pathlib import Path

from .common import Item, find_root, read_csv, relative, value_of

SPLITS = ("train", "val", "test", "id_val", "id_test")
NEEDED = ("split", "location_remapped", "sequence_remapped", "y", "filename")


def read_iwildcam(folder: Path) -> list[Item]:
    """Read the items of iWildCam.

    The label is the species, or empty; the columns are site (the camera trap) and sequence (the frames of one burst).

    Raises:
        L2R2Error: when the folder has another layout, or a table is damaged.
    """
    root = find_root(folder, "iWildCam of WILDS", ("metadata.csv", "categories.csv", "train"), ("iwildcam_v2.0",))
    names = {row["y"]: row["name"] for row in read_csv(root / "categories.csv", ("y", "name"))}
    file = root / "metadata.csv"
    items = []
    for row in read_csv(file, NEEDED):
        name = relative(row["filename"], file)
        columns = {
            "label": value_of(names, row["y"], root / "categories.csv", "y"),
            "split": value_of({split: split for split in SPLITS}, row["split"], file, "split"),
            "site": row["location_remapped"],
            "sequence": row["sequence_remapped"],
        }
        items.append(Item(root / "train" / name, name, columns))
    return items

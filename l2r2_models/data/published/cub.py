"""CUB-200-2011 (Wah et al., Caltech-UCSD Birds-200-2011, CNS-TR-2011-001): 11,788 photos of 200 bird species, boxes and masks.

Layout, from the README in the archive: `images/`, and text files of one line per image or class: `images.txt` (id, file),
`image_class_labels.txt` (id, class id), `classes.txt` (class id, name), `train_test_split.txt` (id, 1 for training),
`bounding_boxes.txt` (id, x, y, width, height). The masks are a separate archive, `segmentations/` with one PNG per image,
unpacked into this folder or next to it.
"""

from __future__ import annotations

from pathlib import Path

from ...boxes.table import Box
from ...errors import L2R2Error
from .common import Item, find_root, read_numbered, relative, value_of

FILES = ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "bounding_boxes.txt")


def read_cub(folder: Path) -> list[Item]:
    """Read the items of CUB-200-2011.

    The label is the species, the splits are train and test. There are boxes, and masks if `segmentations/` exists.

    Raises:
        L2R2Error: when the folder has another layout, or a file is damaged.
    """
    root = cub_root(folder)
    files, classes, splits, labels = (
        read_numbered(root / name) for name in ("images.txt", "classes.txt", "train_test_split.txt", "image_class_labels.txt")
    )
    boxes, masks = boxes_of(root), masks_folder(root)
    items = []
    for key, listed in files.items():
        name = relative(listed, root / "images.txt")
        label = value_of(classes, labels.get(key, ""), root / "image_class_labels.txt", f"the class of image {key}")
        split = value_of({"1": "train", "0": "test"}, splits.get(key, ""), root / "train_test_split.txt", f"image {key}")
        columns = {"label": species(label), "split": split}
        items.append(Item(root / "images" / name, name, columns, boxes.get(name), mask_of(masks, name)))
    return items


def cub_root(folder: Path) -> Path:
    """Find the folder with the text files.

    Raises:
        L2R2Error: when they are missing.
    """
    return find_root(folder, "CUB-200-2011", (*FILES, "images"), ("CUB_200_2011",))


def boxes_of(root: Path) -> dict[str, Box]:
    """Boxes xyxy in pixels, by file name.

    Raises:
        L2R2Error: when a box is not four numbers.
    """
    files, boxes = read_numbered(root / "images.txt"), {}
    for key, text in read_numbered(root / "bounding_boxes.txt").items():
        try:
            x, y, width, height = map(float, text.split())
        except ValueError:
            raise L2R2Error(f'{root / "bounding_boxes.txt"}: the box of image {key} is not four numbers ("{text}").') from None
        if key in files:
            boxes[files[key]] = (x, y, x + width, y + height)
    return boxes


def masks_folder(root: Path) -> Path | None:
    """The folder `segmentations/` in `root` or next to it, or None."""
    return next((p for p in (root / "segmentations", root.parent / "segmentations") if p.is_dir()), None)


def mask_of(masks: Path | None, name: str) -> Path | None:
    """The mask file of an image, or None without masks."""
    return None if masks is None else masks / Path(name).with_suffix(".png")


def species(folder: str) -> str:
    """The species in a class name.

    >>> species("001.Black_footed_Albatross")
    'Black_footed_Albatross'
    """
    return folder.partition(".")[2] or folder

"""Hard ImageNet (Moayeri et al. 2022): masks for 15 classes of ImageNet that rarely occur without their context.

Layout, from the authors' repository mmoayeri/HardImageNet (README, datasets/hard_imagenet.py): `train/` and `val/` with a mask
image WNID_FILE for the image SPLIT/WNID/FILE of ImageNet, e.g. `val/n03535780_ILSVRC2012_val_00000001.JPEG`, where the object is
not black. The images are separate: ImageNet's own folder, or the authors' archive of these classes. The pickles (`meta/`, ranks
of the training images) are not read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import L2R2Error
from .common import Item, find_root, images_in, nonzero


def read_hard_imagenet(folder: Path, imagenet: Path | None = None) -> list[Item]:
    """Read the items of Hard ImageNet.

    The label is ImageNet's name, the splits are train and val, and the column is wnid. There are masks.

    Args:
        folder: the unpacked masks.
        imagenet: the folder with ImageNet's images.

    Raises:
        L2R2Error: when a folder has another layout, or `imagenet` is missing.
    """
    root = find_root(folder, "Hard ImageNet", ("train", "val"), ("hardImageNet", "HardImageNet"))
    if imagenet is None:
        raise L2R2Error("Hard ImageNet has masks only; pass the folder of ImageNet's images (train/WNID/, val/WNID/) as --with.")
    photos = find_root(imagenet, "ImageNet", ("train", "val"), ("hardImageNet_images", "HardImageNet_Images", "ILSVRC2012"))
    label_of = _names()
    items = []
    for split in ("train", "val"):
        for mask in images_in(root / split):
            wnid, _, file = mask.name.partition("_")
            columns = {"label": label_of(wnid), "split": split, "wnid": wnid}
            name = f"{split}/{wnid}/{file}"
            items.append(Item(photos / name, name, columns, mask=mask, read_mask=nonzero))
    if not items:
        raise L2R2Error(f"{root}: is not Hard ImageNet; looked for mask images in train and val.")
    return items


def _names() -> partial[str]:
    """A function that maps a WordNet id to the first name of its class."""
    from timm.data import ImageNetInfo

    return partial(_name, ImageNetInfo("imagenet-1k"))


def _name(info: object, wnid: str) -> str:
    described: str = info.label_name_to_description(wnid)  # type: ignore[attr-defined]
    return described.split(",")[0] or wnid

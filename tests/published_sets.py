"""Tiny folders in the documented layouts of the published sets: images of 16x12 pixels with a red object at BOX."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

BOX = (3, 2, 9, 8)
SIZE = (12, 16)


def object_mask():
    mask = np.zeros(SIZE, bool)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    return mask


def image(path: Path, level: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZE, 3), level, np.uint8)
    pixels[object_mask()] = (220, 30, 30)
    Image.fromarray(pixels).save(path, format="PNG")  # lossless whatever the suffix


def mask(path: Path, shown: int = 255, hidden: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(object_mask(), shown, hidden).astype(np.uint8)).save(path, format="PNG")


def table(path: Path, names: str, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names.split(), *rows])


BIRDS = (
    "001.Black_footed_Albatross/A_1.jpg",
    "001.Black_footed_Albatross/A_2.jpg",
    "014.Indigo_Bunting/I_1.jpg",
    "014.Indigo_Bunting/I_2.jpg",
)


def cub(root: Path) -> Path:
    base = root / "CUB_200_2011"
    for name in BIRDS:
        image(base / "images" / name)
        mask(root / "segmentations" / Path(name).with_suffix(".png"))  # an archive of its own, unpacked beside
    lines = {
        "images.txt": [f"{i} {name}" for i, name in enumerate(BIRDS, 1)],
        "image_class_labels.txt": ["1 1", "2 1", "3 14", "4 14"],
        "classes.txt": ["1 001.Black_footed_Albatross", "14 014.Indigo_Bunting"],
        "train_test_split.txt": ["1 1", "2 0", "3 1", "4 0"],
        "bounding_boxes.txt": [f"{i} 3.0 2.0 6.0 6.0" for i in range(1, 5)],  # x, y, width, height
    }
    for name, content in lines.items():
        (base / name).write_text("\n".join(content) + "\n")
    return root


def waterbirds(root: Path) -> Path:
    base = root / "waterbird_complete95_forest2water2"
    rows = [
        (1, BIRDS[0], 1, 0, 1, "/o/ocean/1.jpg"),
        (2, BIRDS[1], 1, 2, 0, "/b/bamboo_forest/1.jpg"),
        (3, BIRDS[2], 0, 0, 0, "/b/bamboo_forest/2.jpg"),
        (4, BIRDS[3], 0, 1, 1, "/l/lake/natural/1.jpg"),
    ]
    for row in rows:
        image(base / row[1])
    table(base / "metadata.csv", "img_id img_filename y split place place_filename", rows)
    return root


DOG, BIRD = ("00_dog", "n02085936"), ("01_bird", "n01532829")


def in9(root: Path) -> Path:
    base = root / "bg_challenge"
    for (folder, wnid), (_, other) in ((DOG, BIRD), (BIRD, DOG)):
        own = f"{wnid}_00001"
        image(base / "original/val" / folder / f"{own}.JPEG")
        image(base / "mixed_same/val" / folder / f"fg_{own}_bg_{wnid}_00002.JPEG")
        image(base / "mixed_rand/val" / folder / f"fg_{own}_bg_{other}_00001.JPEG")
        image(base / "only_bg_t/val" / folder / f"{own}.JPEG")
        (base / "fg_mask/val" / folder).mkdir(parents=True)
        np.save(base / "fg_mask/val" / folder / f"{own}.npy", object_mask().astype(np.int64))
    return root


def in9l(root: Path) -> Path:
    for folder, wnid in (DOG, BIRD):
        for split in ("train", "val"):
            image(root / "in9l" / split / folder / f"{wnid}_{split}.JPEG")
    return root


def spawrious(root: Path) -> Path:
    """What o2o-hard needs, and one image that it does not."""
    homes = {"bulldog": "jungle", "dachshund": "mountain", "labrador": "snow", "corgi": "desert"}
    away = {"bulldog": "mountain", "dachshund": "snow", "labrador": "desert", "corgi": "jungle"}
    for group in range(2):
        for breed in homes:
            for place in (homes[breed], away[breed], "beach"):
                image(root / "spawrious224" / str(group) / place / breed / f"{place}_{breed}_{group}.png")
    image(root / "spawrious224/0/dirt/corgi/unused.png")
    return root


def counteranimal(root: Path) -> Path:
    for label in ("10 brambling", "296 ice bear"):
        for group in ("common-grass", "counter-sky"):
            image(root / "LAION-final" / label / group / "1.jpg")
    (root / "LAION-final/imagenet_names.txt").write_text("0\ttench\n")
    return root


def metashift(root: Path) -> Path:
    base = root / "MetaShift-Cat-Dog-indoor-outdoor"
    for place in ("train/cat/cat(indoor)", "train/dog/dog(outdoor)", "test/cat/cat(outdoor)", "test/dog/dog(indoor)"):
        image(base / place / f"{len(place)}.jpg")
    image(base / "train/cat/cat(sofa)/21.jpg")  # the same photo in another context
    (base / "imageID_to_group.pkl").write_bytes(b"not a pickle")
    return root


def urbancars(root: Path) -> Path:
    for part in ("bg-0.95_co_occur_obj-0.95/train", "bg-0.5_co_occur_obj-0.5/val", "bg-0.5_co_occur_obj-0.5/test"):
        for car, background, beside in (("urban", "urban", "country"), ("country", "urban", "country")):
            place = root / "urbancars" / part / f"obj-{car}_bg-{background}_co_occur_obj-{beside}"
            image(place / "000.jpg")
            mask(place / "000_mask.png")
            mask(place / "000_co_occur_obj_mask.png", 0, 255)
    return root


HARD = ("n03535780_1.JPEG", "n04228054_2.JPEG")


def hard_imagenet(root: Path) -> Path:
    for split in ("train", "val"):
        for name in HARD:
            mask(root / "hardImageNet" / split / f"{name.split('_')[0]}_{name}", shown=60)
    return root


def imagenet(root: Path) -> Path:
    for split in ("train", "val"):
        for name in HARD:
            image(root / split / name.split("_")[0] / name)
    return root


def iwildcam(root: Path) -> Path:
    base = root / "iwildcam_v2.0"
    rows = [
        (i, split, i, 100 + i, 7, f"s{i}", i % 2, 5 + i % 2, "2013-06-05 05:44:19.000", f"{i}.jpg", f"{i}")
        for i, split in enumerate(("train", "train", "val", "test", "id_val", "id_test"))
    ]
    for row in rows:
        image(base / "train" / row[9])
    names = " split location_remapped location sequence_remapped seq_id y category_id datetime filename image_id"
    table(base / "metadata.csv", "index" + names, rows)
    table(base / "categories.csv", "y category_id name", [(0, 5, "empty"), (1, 6, "meleagris ocellata"), (99999, 9, "unused")])
    return root


VOC = """<annotation><filename>{0}.jpg</filename><size><width>16</width><height>12</height></size>{1}</annotation>"""
OBJECT = "<object><name>{}</name><bndbox><xmin>3.0</xmin><ymin>2.0</ymin><xmax>9.0</xmax><ymax>8.0</ymax></bndbox></object>"


def fod_a(root: Path, classes=("ClampPart", "Cutter", "Hose"), frames: int = 8) -> Path:
    """Frames of each class in two conditions; the last frame of each shows two objects. A class that is not of the twelve."""
    base, rows = root / "FODPascalVOCFormat-V.2.1/VOC2007", []
    for label in classes:
        for weather, light in ((0, 0), (1, 1)):
            for i in range(frames):
                stem = f"{len(rows):06d}"
                image(base / "JPEGImages" / f"{stem}.jpg")
                (base / "Annotations").mkdir(exist_ok=True)
                objects = OBJECT.format(label) * (2 if i == frames - 1 else 1)
                (base / "Annotations" / f"{stem}.xml").write_text(VOC.format(stem, objects))
                rows.append((f"{stem}.jpg", weather, light))
    table(base / "ImageSets/Main/CategorizationData/FOD_categorization_annotations.csv", "File Weather Light", rows)
    return root


def eth80(root: Path) -> Path:
    """Three views of three objects; one outline is black on white."""
    for name in ("apple1", "apple8", "car11", "car12"):
        for view in ("000-000", "022-000", "022-090"):
            image(root / "eth80-cropped256" / name / f"{name}-{view}.png")
            shown = 0 if name == "car11" else 255
            mask(root / "eth80-cropped256" / name / "maps" / f"{name}-{view}-map.png", shown, 255 - shown)
    return root


MAKERS = {
    "waterbirds": (waterbirds, cub),
    "in9": (in9, in9l),
    "spawrious-o2o-hard": (spawrious, None),
    "counteranimal": (counteranimal, None),
    "metashift": (metashift, None),
    "urbancars": (urbancars, None),
    "hard-imagenet": (hard_imagenet, imagenet),
    "cub": (cub, None),
    "iwildcam": (iwildcam, None),
    "fod-a": (fod_a, None),
    "eth80": (eth80, None),
}


def make(name: str, root: Path) -> tuple[Path, Path | None]:
    """The folder of a set, and the second folder where it takes one."""
    maker, extra = MAKERS[name]
    return maker(root / "archive"), extra(root / "extra") if extra else None

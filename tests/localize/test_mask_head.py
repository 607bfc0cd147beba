"""The mask head: its loss and targets, what it learns, and that masks and boxes come out in pixels of the image."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from conftest import sentence, write_dataset
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from l2r2_models import L2R2Error, Predictor, ViewSpec, load_checkpoint
from l2r2_models.boxes import BoxEntry, BoxTable, write_boxes
from l2r2_models.boxes.detections import Detections
from l2r2_models.data.augment import Augment
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.table import read_table
from l2r2_models.images import load_image, load_mask
from l2r2_models.localize import create_localizer
from l2r2_models.models.box_head import features_and_maps, map_channels
from l2r2_models.models.mask_head import FINER, MaskHead, mask_losses
from l2r2_models.train.finetune import finetune
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.recipe import Recipe

CLASSES = ("blue", "green", "red")


def with_masks(folder):
    """The data set of `write_dataset` with a mask file for each square instead of its box."""
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "split", "mask_file"])
        for row in rows:
            mask = np.zeros((40, 60), np.uint8)
            mask[int(row["y0"]) : int(row["y1"]), int(row["x0"]) : int(row["x1"])] = 255
            name = row["file_name"].replace(".png", "_mask.png")
            Image.fromarray(mask).save(folder / name)
            writer.writerow([row["file_name"], row["label"], row["split"], name])
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    data = with_masks(write_dataset(folder / "data", count=24, splits=("train", "test")))
    options = dict(size=64, epochs=20, batch_size=6, lr=3e-3, mask_head=True, box_head=True, fg_mode="masked_crop")
    finetune(data, Recipe.default("timm:resnet10t", False, **options), folder / "run")
    return folder


@pytest.fixture(scope="module")
def rows(trained):
    return read_table(trained / "data").of_split("test").rows


def make(**options):
    torch.manual_seed(0)
    return timm.create_model("l2r2", backbone="resnet10t", num_classes=3, **options).eval()


def iou(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


# ---- the network ----


@pytest.mark.parametrize(
    "backbone", ["resnet10t", "convnextv2_atto", "vit_tiny_patch16_224", "efficientnet_b0", "hiera_tiny_224"]
)
def test_its_map_is_finer_than_the_last_one_at_little_cost(backbone):
    model = timm.create_model("l2r2", backbone=backbone, num_classes=3, mask_head=True).eval()
    view = torch.rand(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        features = model.backbone.forward_features(view)
    with torch.no_grad():
        same, maps = features_and_maps(model.backbone, view, FINER)
    torch.testing.assert_close(same, features)
    assert [m.shape[-1] for m in maps] == ([14] if "vit" in backbone else [7, 14, 28])
    assert [m.shape[1] for m in maps] == map_channels(model.backbone, FINER)
    with torch.no_grad(), FlopCounterMode(display=False) as head:
        found = model.mask_head(maps)
    assert found.shape[1:] == ((28, 28) if "vit" in backbone else (56, 56))
    assert head.get_total_flops() < 0.04 * whole.get_total_flops()


@pytest.mark.parametrize("shared", [True, False])
def test_logits_do_not_change_by_having_it_and_it_sees_the_full_view(shared):
    plain, headed = make(shared=shared), make(shared=shared, mask_head=True, box_head=True)
    boxed = make(shared=shared, box_head=True)
    headed.load_state_dict(plain.state_dict(), strict=False)
    boxed.load_state_dict({k: v for k, v in headed.state_dict().items() if not k.startswith("mask_head.")})
    full, fg = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        a, b, c = (model.forward_views(full, fg) for model in (plain, headed, boxed))
        torch.testing.assert_close(b.masks, headed.segment(full))
    assert torch.equal(plain(full), headed(full)) and torch.allclose(a.fused, b.fused)
    torch.testing.assert_close(b.located.boxes, c.located.boxes)  # the box head gets its own maps
    assert a.masks is None and c.masks is None
    with pytest.raises(L2R2Error, match="has no mask head; train one"):
        plain.segment(full)


def test_the_loss_is_cross_entropy_and_dice_with_the_covered_share_of_each_cell():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 2, 2), torch.zeros(2, 4, 4)
    masks[0, :2, :3] = 1  # covers a whole cell and half a cell
    target = torch.tensor([[[1.0, 0.5], [0, 0]], [[0, 0], [0, 0]]])
    p = logits.sigmoid()
    entropy = -(target * p.log() + (1 - target) * (1 - p).log()).mean((1, 2))
    dice = 1 - (2 * (p * target).sum((1, 2)) + 1) / ((p + target).sum((1, 2)) + 1)
    torch.testing.assert_close(mask_losses(logits, masks), entropy + dice)
    good = torch.where(masks > 0, 20.0, -20.0)
    assert mask_losses(good, masks).max() < 0.01  # and an empty mask that is found to be empty costs nothing


def test_it_learns_the_outline_of_an_object_that_no_box_shows():
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 4), torch.nn.ReLU())
    head = MaskHead([16])
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-2)
    ys, xs = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")

    def batch(count):
        centers, radii = torch.rand(count, 2, 1, 1) * 40 + 12, torch.rand(count, 1, 1) * 6 + 8
        masks = (xs - centers[:, 0]).abs() + (ys - centers[:, 1]).abs() < radii  # diamonds: half of their box
        images = torch.rand(count, 3, 64, 64) * 0.3
        images[:, 0] += masks
        return images, masks

    for _ in range(120):
        images, masks = batch(16)
        optimizer.zero_grad()
        mask_losses(head([features(images)]), masks).mean().backward()
        optimizer.step()
    images, masks = batch(32)
    found = torch.nn.functional.interpolate(head([features(images)])[:, None], 64, mode="bilinear")[:, 0] > 0
    assert np.mean([iou(a, b) for a, b in zip(found, masks)]) > 0.8


def test_it_needs_a_full_view_and_an_fg_that_is_cut():
    for options in (dict(branches=("fg",)), dict(fg_mode="late")):
        with pytest.raises(L2R2Error, match="A mask head needs a full branch and an fg that is cut out of the image"):
            make(mask_head=True, **options)


# ---- its targets ----


def test_the_target_covers_the_object_in_the_full_view(tmp_path):
    table = read_table(with_masks(write_dataset(tmp_path / "data")))
    augment = Augment(0.5, 0.5, 0.0, 0.0)
    for square in (True, False):
        items = ViewDataset(table, CLASSES, ViewSpec(size=64, square=square), ("full", "fg"), segment=True, augment=augment)
        for i in range(12):  # whatever augmentation did, the square of one color is where the target is 1
            item = items[i]
            inside = item["full"][:, item["object_mask"] == 1]
            assert item["has_mask"] and inside.shape[1] > 50
            assert inside.std(1).max() < 0.35 < item["full"].flatten(1).std(1).max()
    plain = ViewDataset(table, CLASSES, ViewSpec(size=60, interpolation="bilinear"), ("full", "fg"), segment=True)[0][
        "object_mask"
    ]
    torch.testing.assert_close(plain[10:50] > 0.5, load_mask(table.rows[0].mask_file, (40, 60)))
    assert plain[:10].sum() == plain[50:].sum() == 0, "the padding is no object"


def test_rows_without_a_mask_are_ignored_and_rows_without_an_object_are_negatives(dataset, tmp_path):
    half = torch.zeros(1, 40, 60, dtype=torch.bool)
    half[:, :, :30] = True
    masked = BoxEntry.from_detections(Detections(torch.tensor([[0.0, 0, 30, 40]]), torch.ones(1), (40, 60), masks=half))
    box = BoxEntry(((0, 0, 9, 9),), (1.0,), ("",), image_size=(40, 60))
    entries = dict(
        zip((f"train_{i:03d}.png" for i in range(4)), (masked, box, BoxEntry(image_size=(40, 60)), BoxEntry(failure="x")))
    )
    write_boxes(BoxTable(entries), tmp_path / "boxes.json", format="coco")
    table = read_table(dataset, boxes=tmp_path / "boxes.json")
    items = ViewDataset(table, CLASSES, ViewSpec(size=32), ("full", "fg"), segment=True)
    batch = torch.utils.data.default_collate([items[i] for i in range(5)])  # a mask, a box, nothing, a failure, not in the file
    assert batch["has_mask"].tolist() == [True, False, True, False, False]
    assert batch["object_mask"].flatten(1).sum(1).gt(0).tolist() == [True, False, False, False, False]
    loss = BranchLoss(make(mask_head=True))
    branches = loss(**{k: v for k, v in batch.items() if k not in ("object_mask", "has_mask")})["loss"]
    each = mask_losses(loss.model.segment(batch["full"]), batch["object_mask"])
    torch.testing.assert_close(loss(**batch)["loss"] - branches, (each[0] + each[2]) / 5, atol=1e-5, rtol=1e-4)


# ---- a trained run ----


def test_a_run_finds_masks_and_boxes_in_pixels_of_the_image(trained, rows):
    localizer = create_localizer(f"mask-head:{trained / 'run'}", device="cpu")
    big = [load_image(row.path).resize((180, 120)) for row in rows]  # three times the size: so are boxes and masks
    for scale, images in ((1, [load_image(row.path) for row in rows]), (3, big)):
        overlaps = []
        for row, found in zip(rows, localizer(images)):
            truth = load_mask(row.mask_file, (40, 60)).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            if len(found):
                assert found.masks.shape == (1, 40 * scale, 60 * scale) and 0.5 < found.scores[0] <= 1
                square = torch.zeros_like(truth)
                x0, y0, x1, y1 = found.boxes[0].round().int().tolist()
                square[y0:y1, x0:x1] = True
            overlaps.append((iou(found.masks[0], truth), iou(square, truth)) if len(found) else (0, 0))
        assert np.mean(overlaps) > 0.6, overlaps


def test_the_run_records_it_and_the_checkpoint_keeps_it(trained):
    checkpoint = load_checkpoint(trained / "run")
    assert checkpoint.localizer == {"spec": "mask-head"} and checkpoint.model.arguments()["mask_head"] is True
    config = json.loads((trained / "run" / "config.json").read_text())
    assert config["model_args"]["mask_head"] is True
    x = torch.rand(1, 3, 64, 64)
    again = timm.create_model(f"local-dir:{trained / 'run'}", pretrained=True).eval()
    assert torch.equal(checkpoint.model.segment(x), again.segment(x))


def test_predict_uses_its_own_masks(trained, rows):
    """The same predictions as with the masks that the localizer found, also where it needs no pass of its own."""
    own = Predictor.from_pretrained(str(trained / "run"), localizer="mask-head", device="cpu")
    images = [row.path for row in rows[:6]]
    found = create_localizer(f"mask-head:{trained / 'run'}", device="cpu")([load_image(path) for path in images])
    given = own(images, boxes=found)
    for a, b, detections in zip(own(images), given, found):
        assert a.objects[0].label == b.objects[0].label and a.objects[0].score == pytest.approx(b.objects[0].score, abs=1e-4)
        assert a.objects[0].box == pytest.approx(detections.boxes[0].tolist(), abs=0.01)
    boxes = own(images, boxes=[d.boxes.tolist() for d in found])
    assert any(a.objects[0].score != pytest.approx(b.objects[0].score, abs=1e-4) for a, b in zip(given, boxes)), "masks matter"


def test_padding_is_never_part_of_the_mask_and_the_level_is_an_option(trained):
    checkpoint = load_checkpoint(trained / "run")
    with torch.no_grad():
        checkpoint.model.mask_head.out.weight.zero_()
        checkpoint.model.mask_head.out.bias.fill_(1.0)  # everywhere 0.73
    image = Image.new("RGB", (61, 20), "gray")
    (found,) = create_localizer("mask-head", device="cpu", checkpoint=checkpoint)([image])
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.0, 0, 61, 20]), atol=1.0, rtol=0)
    assert found.masks.all() and found.scores[0] == pytest.approx(0.7311, abs=1e-3)
    assert not len(create_localizer("mask-head?level=0.8", device="cpu", checkpoint=checkpoint)([image])[0])
    with torch.no_grad():
        checkpoint.model.mask_head.out.bias.fill_(float("nan"))
    with pytest.raises(L2R2Error, match="not finite; its training has diverged"):
        create_localizer("mask-head", device="cpu", checkpoint=checkpoint)([image])


def test_the_command_trains_it_and_refuses_what_would_mislead_it(l2r2, trained, dataset, run, tmp_path):
    base = ["--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 1, "--mask-head"]
    assert l2r2("finetune", trained / "data", *base, "-o", tmp_path / "run").returncode == 0
    found = l2r2(
        "localize", dataset, "--localizer", f"mask-head:{tmp_path / 'run'}", "-o", tmp_path / "b.json", "--format", "coco"
    )
    assert found.returncode == 0, found.stderr
    assert "mask_head needs masks, and no training image has one" in sentence(
        l2r2("finetune", dataset, *base, "-o", tmp_path / "a")
    )
    assert "cannot mix the masks" in sentence(l2r2("finetune", dataset, *base, "--set", "mixup=1", "-o", tmp_path / "mix"))
    with pytest.raises(L2R2Error, match="has no mask head; train one with `l2r2 finetune --mask-head`"):
        create_localizer(f"mask-head:{run}", device="cpu")
    with pytest.raises(L2R2Error, match="finds its object itself; do not set mask_head"):
        from l2r2_models.train.models import create_model

        create_model(Recipe.default("ifam_vit_small_patch14_reg4_dinov2", False, mask_head=True), 3)

"""`finetune --box-head`: trained with the branches, saved in the run, used by predict and localize."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import sentence, write_dataset

from l2r2_models import L2R2Error, ViewSpec
from l2r2_models.boxes import BoxEntry, BoxTable, write_boxes
from l2r2_models.boxes.detections import ViewMap
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.data.augment import Augment
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.table import read_table
from l2r2_models.models.box_head import BoxHead, box_losses
from l2r2_models.train.losses import BranchLoss
from l2r2_models.train.recipe import Recipe

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a box head: few steps, so it has learned next to nothing; everything else is as with a good one."""
    from l2r2_models.train.finetune import finetune

    folder = tmp_path_factory.mktemp("head")
    data = write_dataset(folder / "data", splits=("train", "test"))
    recipe = Recipe.default("timm:resnet10t", False, size=32, epochs=2, batch_size=6, box_head=True)
    finetune(data, recipe, folder / "run")
    return folder


def test_items_say_where_the_object_is_in_the_full_view(dataset):
    table = read_table(dataset)
    for square in (True, False):
        spec = ViewSpec(size=32, square=square)
        item = ViewDataset(table, CLASSES, spec, ("full", "fg"), locate=True)[0]
        box = torch.tensor(table.rows[0].entry.boxes[0])
        back = ViewMap((0, 0, 60, 40), (1, 1), square).boxes_to_image(item["box"])
        torch.testing.assert_close(back, box, atol=1e-4, rtol=0)
    assert "box" not in ViewDataset(table, CLASSES, spec, ("full", "fg"))[0]
    moved = ViewDataset(table, CLASSES, ViewSpec(size=64), ("full", "fg"), locate=True, augment=Augment(0.5, 0.5, 0.0, 0.0))
    for i in range(12):  # whatever augmentation did, the square of one color is inside its box
        item = moved[i]
        x0, y0, x1, y1 = (item["box"] * 64).round().int().tolist()
        inside = item["full"][:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
        assert inside.flatten(1).std(1).max() < 0.35 < item["full"].flatten(1).std(1).max()


def test_rows_without_a_box_are_negatives_and_give_the_box_no_gradient(tmp_path):
    import timm

    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=3, box_head=True)
    loss, view = BranchLoss(model), torch.rand(2, 3, 32, 32)
    batch = dict(labels=torch.tensor([0, 1]), has_fg=torch.zeros(2, dtype=torch.bool), full=view, fg=view)
    without = loss(**batch)["loss"]
    negatives = loss(**batch, box=torch.full((2, 4), float("nan")))["loss"]
    assert negatives > without and negatives - without < 3  # the objectness alone
    head: BoxHead = model.box_head
    loss(**batch, box=torch.full((2, 4), float("nan")))["loss"].backward()
    gradients = head.out.weight.grad[2:]  # center and size
    assert gradients.abs().sum() == 0 and head.out.weight.grad[1].abs().sum() > 0


def test_rows_that_were_not_localized_are_ignored(dataset, tmp_path):
    import timm

    entries = {f"train_{i:03d}.png": BoxEntry(((0, 0, 9, 9),), (1.0,), ("",), image_size=(40, 60)) for i in range(4)}
    entries["train_001.png"], entries["train_002.png"] = BoxEntry(image_size=(40, 60)), BoxEntry(failure="out of memory")
    write_boxes(BoxTable(entries), tmp_path / "boxes.json")
    table = read_table(dataset, boxes=tmp_path / "boxes.json")
    items = ViewDataset(table, CLASSES, ViewSpec(size=32), ("full", "fg"), locate=True)
    batch = torch.utils.data.default_collate([items[i] for i in (0, 1, 2, 4)])  # a box, none, a failure, not in the file
    assert batch["localized"].tolist() == [True, True, False, False]
    assert batch["box"].isfinite().all(1).tolist() == [True, False, False, False]
    loss = BranchLoss(timm.create_model("l2r2", backbone="resnet10t", num_classes=3, box_head=True).eval())
    branches = loss(**{k: v for k, v in batch.items() if k not in ("box", "localized")})["loss"]
    of_box, of_object = box_losses(loss.model.locate(batch["full"]), batch["box"])
    torch.testing.assert_close(loss(**batch)["loss"] - branches, of_box[0] + of_object[:2].sum() / 4, atol=1e-5, rtol=1e-4)
    masks = replace(table, rows=tuple(replace(row, mask_file=row.path) for row in table.rows))
    assert ViewDataset(masks, CLASSES, ViewSpec(size=32), ("full", "fg"), locate=True)[4]["localized"]


def test_the_run_records_its_localizer(trained, tmp_path, l2r2):
    checkpoint = hub.load_checkpoint(trained / "run")
    assert checkpoint.model.box_head is not None and checkpoint.localizer == {"spec": "head"}
    data = trained / "data"
    assert l2r2("localize", data, "--localizer", "center?share=0.6", "-o", tmp_path / "boxes.json").returncode == 0
    arguments = ["--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 1, "--boxes", tmp_path / "boxes.json"]
    result = l2r2("finetune", data, *arguments, "-o", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert hub.load_checkpoint(tmp_path / "run").localizer == {"spec": "center?share=0.6"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["boxes_from"]["localizer"] == "center?share=0.6"


def test_finetune_learns_a_head_by_its_flag_and_refuses_what_would_mislead_it(l2r2, dataset, tmp_path):
    base = ["finetune", dataset, "--model", "timm:resnet10t", "--no-pretrained", "--size", 32, "--epochs", 1, "--box-head"]
    assert l2r2(*base, "-o", tmp_path / "run").returncode == 0
    assert hub.load_checkpoint(tmp_path / "run").model.box_head is not None
    assert "mixup and cutmix cannot mix the boxes" in sentence(l2r2(*base, "--set", "mixup=0.2", "-o", tmp_path / "mix"))
    assert "A box head needs a full branch" in sentence(l2r2(*base, "--branches", "fg", "-o", tmp_path / "fg"))
    with pytest.raises(L2R2Error, match="finds its object itself"):
        from l2r2_models.train.models import create_model

        create_model(Recipe.default("ifam_vit_small_patch14_reg4_dinov2", False, box_head=True), 3)

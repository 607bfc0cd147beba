"""The box head: training, cost, saving with the model, and that it is only used on request."""

import pytest
import timm
import torch
from conftest import write_run
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import generalized_box_iou

from l2r2_models import L2R2Error
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.models.backbones import feature_map
from l2r2_models.models.box_head import BoxHead, FoundBoxes, box_losses, features_and_maps
from l2r2_models.views import cut_batch

BACKBONES = [
    "resnet10t",
    "convnextv2_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "hiera_tiny_224",
]
NAN = [float("nan")] * 4


def make(**options):
    torch.manual_seed(0)
    return timm.create_model("l2r2", backbone="resnet10t", num_classes=3, **options).eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_costs_less_than_a_hundredth_of_the_backbone(backbone):
    model = timm.create_model("l2r2", backbone=backbone, num_classes=3, box_head=True).eval()
    view = torch.rand(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        features = model.backbone.forward_features(view)
    with torch.no_grad():
        same, maps = features_and_maps(model.backbone, view)
    torch.testing.assert_close(same, features)
    assert maps[0].shape[1] == model.num_features
    grids = [m.shape[-1] for m in maps]
    assert grids == ([14] if "vit" in backbone else [7, 14])  # a plain ViT has one resolution
    with torch.no_grad(), FlopCounterMode(display=False) as head:
        found = model.box_head(maps)
    assert found.boxes.shape == (1, 4) and head.get_total_flops() < 0.01 * whole.get_total_flops()


def test_a_feature_map_keeps_its_orientation():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), num_classes=0).eval()
    tokens = torch.arange(1 + 8).float()[None, :, None].expand(1, 9, 4)  # a class token, then 4 rows of 2 patches
    assert feature_map(vit, tokens, torch.zeros(1, 3, 64, 32))[0, 0].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize("shared", [True, False])
def test_logits_do_not_change_by_having_a_head(shared):
    plain, headed = make(shared=shared), make(shared=shared, box_head=True)
    headed.load_state_dict(plain.state_dict(), strict=False)
    full, fg = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        a, b = plain.forward_views(full, fg), headed.forward_views(full, fg)
        assert torch.equal(plain(full), headed(full))  # never silently
    assert torch.allclose(a.full, b.full) and torch.allclose(a.fg, b.fg) and torch.allclose(a.fused, b.fused)
    assert a.located is None and b.located.boxes.shape == (2, 4)
    torch.testing.assert_close(headed.locate(full).boxes, b.located.boxes)


def test_forward_uses_the_head_when_asked_and_cuts_what_it_found():
    model, x = make(box_head=True), torch.rand(3, 3, 64, 48)
    with torch.no_grad():
        model.box_head.out.bias[1] = 0.0
        found = model.locate(x)
        boxes = found.in_pixels(64, 48, 0.2)
        expected = model.forward_views(x, cut_batch(x, boxes, model.view_spec, "fg")[0], boxes.isfinite().all(1)).fused
        torch.testing.assert_close(model(x, localize="head"), expected)
        model.box_head.out.bias[1] = -100.0  # sure that there is nothing
        torch.testing.assert_close(model(x, localize="head"), model(x))
    with pytest.raises(L2R2Error, match="has no box head; train one"):
        make()(x, localize="head")
    for wrong in (dict(localize="detector"), dict(localize="head", boxes=boxes)):
        with pytest.raises(L2R2Error, match="Pass either boxes or localize"):
            model(x, **wrong)


def test_boxes_in_pixels_are_clipped_and_unsure_ones_are_none():
    found = FoundBoxes(torch.tensor([[-0.5, 0.25, 0.5, 1.5], [0, 0, 1, 1]]), torch.tensor([3.0, -3.0]))
    boxes = found.in_pixels(100, 200, 0.5)
    assert boxes[0].tolist() == [0, 25, 100, 100] and boxes[1].isnan().all()


def test_the_losses_are_giou_l1_and_objectness_and_rows_without_a_box_are_negatives():
    boxes = torch.rand(4, 4).sort(-1).values[:, [0, 1, 2, 3]]
    found = FoundBoxes(boxes.clone().requires_grad_(), torch.tensor([0.0, 2.0, -2.0, 1.0], requires_grad=True))
    target = torch.rand(4, 4).sort(-1).values
    target[2] = torch.tensor(NAN)
    of_box, of_object = box_losses(found, target)
    for i in (0, 1, 3):
        giou = generalized_box_iou(boxes[i : i + 1], target[i : i + 1])[0, 0]
        assert of_box[i].item() == pytest.approx((2 * (1 - giou) + 5 * (boxes[i] - target[i]).abs().mean()).item(), abs=1e-4)
        assert of_object[i].item() == pytest.approx(-torch.sigmoid(found.objectness[i]).log().item(), abs=1e-5)
    assert of_box[2] == 0 and of_object[2].item() == pytest.approx(-torch.sigmoid(torch.tensor(2.0)).log().item(), abs=1e-5)
    (of_box.sum() + of_object.sum()).backward()
    assert found.boxes.grad[2].abs().sum() == 0 and found.boxes.grad.isfinite().all()


def test_it_learns_where_a_square_is():
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), torch.nn.ReLU())
    head = BoxHead([16])
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-2)

    def batch(count):
        images, boxes = torch.rand(count, 3, 64, 64) * 0.3, torch.tensor([NAN] * count)
        for i in range(count // 2):
            x, y = torch.randint(0, 40, (2,)).tolist()
            images[i, 0, y : y + 24, x : x + 24] = 1
            boxes[i] = torch.tensor([x, y, x + 24, y + 24]) / 64
        return images, boxes

    for _ in range(250):
        images, boxes = batch(32)
        of_box, of_object = box_losses(head([features(images)]), boxes)
        optimizer.zero_grad()
        (of_box.mean() + of_object.mean()).backward()
        optimizer.step()
    images, boxes = batch(64)
    found = head([features(images)])
    overlap = generalized_box_iou(found.boxes, boxes).diagonal()[:32]
    assert overlap.mean() > 0.6 and ((found.objectness > 0) == boxes.isfinite().all(1)).float().mean() > 0.95


def test_it_travels_with_the_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", box_head=True)
    model = hub.load_checkpoint(run).model
    assert model.box_head is not None and model.arguments()["box_head"] is True
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(model.locate(x).boxes, hub.load_checkpoint(run).model.locate(x).boxes)
    assert hub.load_checkpoint(write_run(tmp_path / "plain")).model.box_head is None


def test_a_head_needs_a_full_view_and_an_fg_that_is_cut():
    for options in (dict(branches=("fg",)), dict(fg_mode="late")):
        with pytest.raises(L2R2Error, match="A box head needs a full branch and an fg that is cropped"):
            make(box_head=True, **options)

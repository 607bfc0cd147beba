"""Views, data sets, predictions, runs and audits of models whose fg is masked inside the network."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import l2r2_models
from l2r2_models import L2R2Error, Predictor, ViewSpec, make_views
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.data.dataset import ViewDataset
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.train.finetune import finetune
from l2r2_models.train.models import create_model
from l2r2_models.train.recipe import Recipe

VIT = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}
KINDS = {"late": ("resnet10t", {}), "tokens": ("vit_tiny_patch16_224", VIT)}


def views_of(kind, boxes, masks=None, size=64):
    image = torch.randint(0, 255, (40, 80, 3), dtype=torch.uint8)
    return make_views([image], boxes, ViewSpec(size=size, fg_mode=kind), masks=masks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_cut_as_the_whole_image_is(kind):
    views = views_of(kind, torch.tensor([[20.0, 10, 60, 30]]))
    assert views.fg is None and views.has_fg.all() and set(views.inputs()) == {"full", "has_fg", "mask"}
    expected = torch.zeros(64, 64)
    expected[24:40, 16:48] = 1  # 80 x 40 pixels become 64 x 32, with 16 rows of padding above
    assert (views.mask[0] - expected).abs().mean() < 0.02
    assert views.mask.min() >= 0 and views.mask.max() <= 1
    given = torch.zeros(40, 80, dtype=torch.bool)
    given[10:30, 20:40] = True
    cut = views_of(kind, torch.tensor([[20.0, 10, 60, 30]]), [given]).mask[0]
    assert cut[30, 24] > 0.9 and cut[30, 44] < 0.1  # the mask, not its box


def test_an_empty_mask_or_no_box_is_not_found_and_keeps_the_whole_image():
    for views in (
        views_of("tokens", torch.full((1, 4), float("nan"))),
        views_of("tokens", torch.tensor([[20.0, 10, 60, 30]]), [torch.zeros(40, 80, dtype=torch.bool)]),
    ):
        assert not views.has_fg.any() and views.mask[0, 32].min() > 0.99


def test_parts_need_no_box():
    views = views_of("parts", None)
    assert views.has_fg.all() and set(views.inputs()) == {"full", "has_fg"}


def test_prediction_gives_the_reason_for_an_empty_mask(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("l2r2", backbone="vit_tiny_patch16_224", num_classes=3, fg_mode="tokens", **VIT)
    net.view_spec = ViewSpec.from_pretrained_cfg(net.pretrained_cfg, size=64, fg_mode="tokens", coverage=1.0)
    save_checkpoint(net, tmp_path / "run", ["a", "b", "c"])
    predict = Predictor.from_pretrained(tmp_path / "run")
    image = Image.new("RGB", (64, 64))
    (found,) = predict(image, [[0, 0, 40, 40]]).objects
    assert found.source == "fused" and found.fg is not None
    (lost,) = predict(image, [[3, 3, 12, 12]]).objects  # covers no patch as a whole
    assert lost.source == "full" and "mask is empty" in lost.reason and lost.label == lost.full.label and lost.fg is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:resnet10t", {"fg_mode": "late", "late_stage": "before_last", "late_pool": "all"}),
        ("l2r2_masked_vit_small_patch16_224", {"coverage": 0.1, "backbone": {"depth": 2, "embed_dim": 48, "num_heads": 3}}),
    ],
)
def test_finetune_round_trip(tmp_path, dataset, name, options):
    """Trained, saved, loaded: the views, the logits and the predictions are those of the trained model."""
    recipe = Recipe.default(name, False, size=32, epochs=1, batch_size=6, **options)
    result = finetune(dataset, recipe, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    spec = checkpoint.model.view_spec
    assert spec.fg_mode == (recipe.fg_mode or "tokens")
    assert (spec.late_stage, spec.late_pool, spec.coverage) == (recipe.late_stage, recipe.late_pool, recipe.coverage)
    val = read_table(dataset).of_split("val")
    logits = branch_logits(checkpoint, val)
    answers = torch.where(logits.has_fg[:, None], logits.logits["fg"], logits.logits["full"])
    reached = (answers.argmax(1) == logits.labels).float().mean().item()
    assert reached == pytest.approx(result.metrics["fg_accuracy"])
    item = ViewDataset(val, checkpoint.labels, spec, checkpoint.model.branches)[0]
    assert set(item) == {"full", "mask", "has_fg", "labels"}
    (seen,) = Predictor(checkpoint)(val.rows[0].path, val.rows[0].entry.detections((40, 60), "row")).objects
    probabilities = logits.logits["fg"][0].softmax(0)
    if logits.has_fg[0]:
        assert seen.source == "fused" and seen.fg.score == pytest.approx(probabilities.max().item(), abs=1e-4)
    else:
        assert seen.source == "full"


def test_mixing_images_under_a_mask_is_refused(tmp_path, dataset):
    with pytest.raises(L2R2Error, match="mixup"):
        finetune(dataset, Recipe.default("timm:resnet10t", False, size=32, fg_mode="late", mixup=0.2), tmp_path / "run")


def test_the_masked_vits_are_registered_with_tokens():
    net = timm.create_model("l2r2_masked_vit_small_patch16_224", num_classes=2, **VIT)
    assert net.view_spec.fg_mode == "tokens"
    assert l2r2_models.models.registry.ARCHITECTURES["l2r2_masked_vit_base_patch14_reg4_dinov2"]
    crop = timm.create_model("l2r2_masked_vit_small_patch16_224", num_classes=2, views=ViewSpec(size=64), **VIT)
    assert crop.view_spec.fg_mode == "crop"  # a checkpoint that was trained otherwise stays as it was


@pytest.mark.parametrize("kind", KINDS)
def test_the_audit_and_known_full_logits_take_the_same_path(kind, tmp_path):
    """What looks at an L2R2 from outside passes the mask on: the audit, and the predictor after its box head's pass."""
    from l2r2_models.audit.classifier import Audited
    from l2r2_models.predict.items import Item, Job, Pending, Row

    backbone, options = KINDS[kind]
    net = timm.create_model("l2r2", backbone=backbone, num_classes=3, fg_mode=kind, **options).eval()
    net.view_spec = ViewSpec.from_pretrained_cfg(net.pretrained_cfg, size=64, fg_mode=kind)
    save_checkpoint(net, tmp_path / "run", ["a", "b", "c"])
    predictor = Predictor.from_pretrained(tmp_path / "run")
    image, boxes = torch.randint(0, 255, (64, 80, 3), dtype=torch.uint8), torch.tensor([[10.0, 6, 50, 50]])
    views = make_views([image], boxes, net.view_spec)
    with torch.inference_mode():
        expected = net.forward_views(**views.inputs())
        audited = Audited("run", net, (("a",), ("b",), ("c",)), net.view_spec, net.branches)(views)
        assert torch.equal(audited["fg"], expected.fg) and torch.equal(audited["fused"], expected.fused)
        item = Item(None, Image.fromarray(image.numpy()), None, full=expected.full[0])
        seen = predictor.network([Job(Pending(item, [Row(boxes[0], 1.0, "", None)]), 0)]).output
    assert (
        seen.has_fg.tolist() == [True]
        and torch.allclose(seen.fg, expected.fg, atol=1e-5)
        and torch.equal(seen.full, expected.full)
    )


@pytest.mark.parametrize(("kind", "side", "seen"), [("tokens", 1, 0), ("tokens", 12, 4), ("late", 0, 0), ("late", 1, 4)])
def test_finetune_counts_the_images_whose_object_fg_can_see(tmp_path, kind, side, seen):
    """A mask of one pixel is something to late masking, and keeps no patch."""
    (tmp_path / "data").mkdir()
    rows = ["file_name,label,x0,y0,x1,y1,mask_file"]
    for i in range(4):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(tmp_path / "data" / f"{i}.png")
        mask = np.zeros((32, 32), np.uint8)
        mask[8 : 8 + side, 8 : 8 + side] = 255
        Image.fromarray(mask).save(tmp_path / "data" / f"m{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]},8,8,20,20,m{i}.png")
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows))
    recipe = Recipe.default("timm:test_vit", False, size=32, epochs=1, batch_size=2, fg_mode=kind)
    if seen:
        assert finetune(tmp_path / "data", recipe, tmp_path / "run").with_box == seen
    else:
        with pytest.raises(L2R2Error, match=r"no training image has a usable box or mask \(inside the image, not empty"):
            finetune(tmp_path / "data", recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model": "timm:test_vit", "fg_mode": "tokens", "backbone": {"attn_drop_rate": 0.1}}, "attn_drop_rate does not work"),
        (
            {"model": "timm:test_vit", "fg_mode": "late", "late_stage": "before_last", "grad_checkpointing": True},
            "grad_checkpointing does not work",
        ),
        ({"model": "timm:mixer_s32_224", "fg_mode": "late", "size": 224}, "MlpMixer cannot be masked late"),
    ],
)
def test_what_cannot_be_trained_is_reported_before_the_images_are_read(keys, why):
    with pytest.raises(L2R2Error, match=why):
        create_model(Recipe.read("scratch", {"size": 32, **keys}), 3)

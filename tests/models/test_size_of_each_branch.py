"""Models whose branches have views of different sizes: the network, its checkpoint, and all that uses one."""

import json

import pytest
import timm
import torch
from conftest import COLORS
from PIL import Image

from l2r2_models import L2R2Error, Predictor
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.checkpoints.convert import split
from l2r2_models.checkpoints.export import export_run
from l2r2_models.explain.explainer import Explainer
from l2r2_models.localize import create_localizer

SIZES = {"full": 32, "fg": 64}
BOX = [[20.0, 5, 50, 35]]


def make(backbone="resnet10t", size=64, sizes=SIZES, **options):
    torch.manual_seed(0)
    views = {"size": size, "sizes": sizes}
    return timm.create_model("l2r2", backbone=backbone, num_classes=3, views=views, **options).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes") / "run"
    hub.save_checkpoint(make(box_head=True), folder, sorted(COLORS))
    return folder


@pytest.fixture(scope="module")
def photo():
    pixels = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_views_of_two_sizes_are_two_computations(shared):
    model, full, fg = make(shared=shared), torch.rand(3, 3, 32, 32), torch.rand(3, 3, 64, 64)
    has_fg = torch.tensor([True, False, True])
    out = model.forward_views(full, fg, has_fg)
    alone = {"full": model.forward_views(full).full, "fg": model.forward_views(fg=fg).fg}
    assert torch.equal(out.full, alone["full"]) and torch.equal(out.fg, alone["fg"])
    assert torch.equal(out.fused, model.fuse(alone, has_fg))


@torch.no_grad()
def test_views_of_one_size_still_share_a_pass():
    model, passes = make(branches=("full", "fg", "bg")), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[0]))
    model.forward_views(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 64, 64), bg=torch.rand(2, 3, 64, 64))
    model.forward_views(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64), bg=torch.rand(2, 3, 64, 64))
    assert passes == [2, 4, 6]


@torch.no_grad()
def test_a_batch_is_at_the_size_of_the_first_branch():
    model, x, boxes = make(), torch.rand(1, 3, 32, 32), torch.tensor([[4.0, 4, 20, 20]])
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    model(x)
    model(x, boxes)
    assert seen == [(32, 32), (32, 32), (64, 64)]


def test_a_backbone_of_one_size_refuses_others():
    with pytest.raises(L2R2Error, match=r"vit_tiny_patch16_224 takes views of 224 x 224 pixels only; leave sizes out"):
        make("vit_tiny_patch16_224", 224, {"full": 112})
    with pytest.raises(L2R2Error, match="pass img_size=64"):
        make("vit_tiny_patch16_224", 64, {})
    flexible = make("vit_tiny_patch16_224", 64, SIZES, dynamic_img_size=True, depth=2)
    assert flexible.forward_views(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 64, 64)).fused.shape == (1, 3)
    flexible.set_input_size(img_size=48)
    assert [flexible.view_spec.size_of(branch) for branch in flexible.branches] == [48, 48]


def test_a_checkpoint_keeps_the_sizes(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    assert config["model_args"]["views"]["sizes"] == SIZES
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32], "timm feeds the full branch"
    loaded = hub.load_checkpoint(run)
    assert loaded.model.view_spec == make().view_spec
    hub.save_checkpoint(make(shared=False), tmp_path / "two", sorted(COLORS))
    parts = split(tmp_path / "two", tmp_path / "split")
    sizes = {b: json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"] for b, folder in parts.items()}
    assert sizes == {"full": [3, 32, 32], "fg": [3, 64, 64]}


def test_predictions_are_those_of_the_branches_alone(run, photo):
    prediction = Predictor.from_pretrained(run).keeping_logits()(photo, BOX)
    for branch, size in SIZES.items():
        single = make(sizes={}, size=size)
        single.load_state_dict(hub.load_checkpoint(run).model.state_dict(), strict=False)
        alone = Predictor(hub.Checkpoint(single, tuple(sorted(COLORS)), {}, "alone", "")).keeping_logits()(photo, BOX)
        logits = prediction.objects[0].logits[branch]
        assert logits == pytest.approx(alone.objects[0].logits[branch], abs=1e-4)


def test_the_box_head_and_localizers_see_the_full_view(run, photo):
    checkpoint = hub.load_checkpoint(run)
    with torch.no_grad():
        views = Predictor(checkpoint).model.locate(torch.zeros(1, 3, 32, 32))
    assert views.boxes.shape == (1, 4)
    for spec in ("head", "cam", "ncut", "ncut?size=64"):
        localizer = create_localizer(spec.replace("ncut", f"ncut:{run}").replace("cam", f"cam:{run}"), checkpoint=checkpoint)
        seen = []
        handle = localizer.model.backbone.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape[-1]))
        (found,) = localizer([photo])
        handle.remove()
        assert found.image_size == (40, 60)
        assert set(seen) <= {64 if "size" in spec else 32}, spec
    assert Predictor(checkpoint, localizer="head")(photo).objects


@pytest.mark.parametrize("method", ["gradcam", "ig"])
def test_explanations_cover_both_views(run, photo, method):
    explanation = Explainer(hub.load_checkpoint(run), method=method, numbers=False)(photo, BOX)
    assert {b: tuple(view.shape[:2]) for b, view in explanation.views.items()} == {"full": (32, 32), "fg": (64, 64)}


@pytest.mark.parametrize("takes", ["views", "image"])
def test_an_export_has_the_sizes(run, tmp_path, takes):
    exported = export_run(run, tmp_path / "model.pt2", takes=takes)
    assert exported.difference < 1e-4

"""Saliency maps of networks whose evidence is known, metrics checked by hand, and counterfactuals with known effects."""

from dataclasses import replace

import pytest
import timm
import torch
from audit_cases import GROUNDS, OBJECTS
from explain_cases import spots
from PIL import Image

from l2r2_models import Explainer, L2R2Error, Predictor
from l2r2_models.boxes.detections import ViewMap
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.explain.measures import against_mask, insertion_deletion
from l2r2_models.explain.saliency import Question, attributions, branch_input, default_method, on_image, saliency
from l2r2_models.views import ViewSpec, make_views, view_map

BOX = [10, 6, 26, 22]
METHODS = ("gradcam", "ig", "occlusion")


def scene(label="red", ground=None, size=(40, 60)):
    """A square of an object's color on the ground of its class, or of another."""
    pixels = torch.empty(*size, 3, dtype=torch.uint8)
    pixels[:] = torch.tensor(GROUNDS[ground or label], dtype=torch.uint8)
    x0, y0, x1, y1 = BOX
    pixels[y0:y1, x0:x1] = torch.tensor(OBJECTS[label], dtype=torch.uint8)
    return pixels


def checkpoint(tmp_path, model, labels=tuple(OBJECTS)):
    save_checkpoint(model, tmp_path / "run", list(labels))
    return load_checkpoint(tmp_path / "run")


def views_of(model, pixels, box=BOX):
    return make_views([pixels], torch.tensor([box]).float(), model.view_spec, branches=model.branches)


# ---- sanity: the maps lie where the reasons are ----


@pytest.mark.parametrize("method", METHODS)
def test_the_background_decides_full_and_the_object_fg(tmp_path, method):
    found = Explainer(checkpoint(tmp_path, spots()), method=method, numbers=False)(scene(), [BOX])
    assert found.prediction.full.label == found.prediction.fg.label == "red"
    assert found.measures["full"]["share"] < 0.1 < found.measures["full"]["flat"] < 0.12
    assert found.measures["fg"]["share"] > 0.8 and found.measures["fg"]["ap"] > 0.8
    assert found.measures["full"]["share"] < found.measures["fused"]["share"] < found.measures["fg"]["share"]


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_feature_is_found(method):
    """Gray everywhere but for one cell of the grid that shows the color that the branch looks for."""
    model, pixels = spots(branches=("full",), fusion="average"), torch.full((32, 32, 3), 128, dtype=torch.uint8)
    pixels[20:24, 8:12] = torch.tensor(GROUNDS["green"], dtype=torch.uint8)
    (values,) = saliency(model, views_of(model, pixels), "full", Question((1,)), method).values()
    image = on_image({"full": values}, {"full": view_map("full", model.view_spec, (32, 32))}, (32, 32))
    top, left = divmod(int(image.argmax()), 32)
    assert 19 <= top <= 24 and 7 <= left <= 12
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[18:26, 6:14] = True
    assert image[inside].sum() / image.sum() > 0.6


@pytest.mark.parametrize("method", METHODS)
def test_randomized_weights_change_the_map(method):
    """Adebayo et al., NeurIPS 2018: a map that stays the same explains the picture and not the network."""
    torch.manual_seed(0)
    colors = torch.tensor([*OBJECTS.values(), *GROUNDS.values()], dtype=torch.uint8)
    pixels = colors[torch.randint(6, (8, 8))].repeat_interleave(4, 0).repeat_interleave(4, 1)  # a patchwork of 8x8 cells
    model = spots()
    views = views_of(model, pixels, [0, 0, 32, 32])

    def of() -> torch.Tensor:
        return saliency(model, views, "full", Question((0,)), method)["full"].flatten()

    before, alike = of(), []
    assert torch.equal(before, of())
    for _ in range(4):
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.reset_parameters()
        alike.append(float(torch.corrcoef(torch.stack([before, of()]))[0, 1]))
    assert sum(alike) / 4 < 0.5, alike


# ---- the question, the fusion, the way back ----


def test_a_contrast_asks_for_the_difference():
    """The red object speaks for red, whatever it is compared with; the ground of green for green and not for blue."""
    model, pixels = spots(), scene("red", "green")
    views = views_of(model, pixels)
    logits = model.forward_branches(full=views.full)["full"]
    assert torch.isclose(Question((1,), (2,)).score(logits), logits[:, 1] - logits[:, 2]).all()
    assert torch.isclose(Question((0, 1, 2)).score(logits), logits.logsumexp(1)).all()
    for_green = saliency(model, views, "full", Question((1,), (2,)), "gradcam")["full"]
    for_blue = saliency(model, views, "full", Question((2,), (1,)), "gradcam")["full"]
    assert for_green.max() > 0 and for_blue.max() == 0


def test_integrated_gradients_add_up_to_the_difference_of_scores():
    model, pixels = spots(), scene()
    given, question = branch_input(model, "full", views_of(model, pixels)), Question((0,), (1,))
    blank = torch.zeros_like(given.view)
    values = attributions("ig", lambda x: question.score(given.logits(x)), given.view[..., :28, :28], blank[..., :28, :28])
    change = [question.score(given.logits(x[..., :28, :28])) for x in (given.view, blank)]
    assert torch.isclose(values.sum(), (change[0] - change[1])[0], rtol=0.05)


def test_the_fused_map_is_what_the_fusion_takes_of_each_branch():
    pixels, question = scene(), Question((0,))
    average, views = spots("average"), views_of(spots(), pixels)
    fused = saliency(average, views, "fused", question, "gradcam")
    for branch in ("full", "fg"):
        assert torch.allclose(fused[branch], saliency(average, views, branch, question, "gradcam")[branch] / 2, atol=1e-6)
    by_fg = saliency(spots({"name": "robust", "threshold": 0.0}), views, "fused", question, "gradcam")
    assert by_fg["fg"].max() > 0 and by_fg["full"].max() == 0


def test_without_an_object_only_the_whole_image_is_explained(tmp_path):
    found = Explainer(checkpoint(tmp_path, spots()), method="gradcam")(scene())
    assert found.box is None and set(found.maps) == {"full", "fused"} and not found.changes
    assert torch.allclose(found.maps["full"], found.maps["fused"]) and found.outside is None
    assert 0 <= found.measures["fused"]["deletion"] < found.measures["fused"]["insertion"] <= 1


@pytest.mark.parametrize("mode", ["crop", "masked"])
def test_a_view_maps_back_to_where_it_was_cut(mode):
    spec = ViewSpec(size=64, fg_mode=mode, margin=0.25, fill=(0, 0, 0), mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = torch.zeros(50, 80, 3, dtype=torch.uint8)
    pixels[20:24, 40:44] = 255
    box = torch.tensor([30.0, 10.0, 60.0, 40.0])
    seen = make_views([pixels], box[None], spec, branches=("fg",)).fg[0, 0].clamp(min=0)
    back = view_map("fg", spec, (50, 80), box).map_to_image(seen, (50, 80))
    ys, xs = torch.meshgrid(torch.arange(50.0), torch.arange(80.0), indexing="ij")
    assert abs(float((back * ys).sum() / back.sum()) - 21.5) < 0.5 and abs(float((back * xs).sum() / back.sum()) - 41.5) < 0.5


def test_what_a_map_holds_it_holds_on_the_image_however_large_the_view_is_drawn():
    torch.manual_seed(0)
    values = torch.rand(7, 7)
    for window in ((0, 0, 64, 64), (16, 16, 48, 48)):
        drawn = on_image({"fg": values}, {"fg": ViewMap(window, (32, 32))}, (64, 64))
        assert torch.isclose(drawn.sum(), values.sum(), rtol=0.02)


# ---- ViTs and ifam ----


def test_vit_rollout_by_a_naive_product_and_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("l2r2", backbone="vit_tiny_patch16_224", num_classes=3, **small).eval()
    views = views_of(model, scene())
    fused = [block.attn.fused_attn for block in model.backbone.blocks]
    values = saliency(model, views, "full", Question((0,)), "rollout")["full"]
    assert values.shape == (4, 4) and [block.attn.fused_attn for block in model.backbone.blocks] == fused
    tokens, expected = model.backbone._pos_embed(model.backbone.patch_embed(views.full)), torch.eye(17)
    for block in model.backbone.blocks:
        q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(1, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        mixed = 0.5 * (q @ k.transpose(2, 3) / 12**0.5).softmax(3)[0].mean(0) + 0.5 * torch.eye(17)
        tokens, expected = block(tokens), mixed @ expected
    assert torch.allclose(values.flatten(), expected[0, 1:], atol=1e-5)
    for method in ("gradcam", "ig"):
        found = saliency(model, views, "fused", Question((0,), (1,)), method)
        assert set(found) == {"full", "fg"} and all(v.isfinite().all() for v in found.values())


def test_ifam_has_part_maps_and_counterfactuals_without_each_part(tmp_path):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_parts": 3}
    model = timm.create_model("ifam_vit_tiny_patch16_224", num_classes=3, **small).eval()
    assert default_method(model) == "parts"
    explain = Explainer(checkpoint(tmp_path, model))
    found = explain(scene(), [BOX])
    kept = model.find_parts(views_of(model, scene()).full).keep[0]
    assert torch.equal(found.own["fg"], kept.float())
    assert {"part_0", "part_1", "part_2"} <= {c.name for c in found.changes} and not model.interventions()
    assert "share" in found.measures["full"]  # measured by the box that the network never saw
    with pytest.raises(L2R2Error, match="drops tokens; choose ig or occlusion"):
        Explainer(checkpoint(tmp_path, model), method="gradcam")(scene())
    assert Explainer(checkpoint(tmp_path, model), method="ig", numbers=False)(scene()).maps["fused"].isfinite().all()


def test_late_masking_has_no_saliency_outside_of_the_mask():
    model = spots()
    model.view_spec = replace(model.view_spec, fg_mode="late")
    views = make_views([scene()], torch.tensor([BOX]).float(), model.view_spec)
    values = saliency(model, views, "fg", Question((0,)), "gradcam")["fg"]
    assert values.max() > 0
    inside = torch.nn.functional.adaptive_max_pool2d(views.mask, values.shape[-1])[0] > 0
    assert values[~inside].max() == 0


# ---- numbers ----


def test_measures_of_a_perfect_a_flat_and_a_reversed_map():
    inside = torch.zeros(20, 20, dtype=torch.bool)
    inside[5:10, 5:15] = True
    perfect, flat, reversed_ = (against_mask(m.float(), inside) for m in (inside, torch.ones(20, 20), ~inside))
    assert perfect == {"share": 1.0, "flat": 0.125, "iou": 1.0, "delta": 1.0, "ap": 1.0}
    assert flat["share"] == 0.125 and flat["delta"] == 0 and flat["ap"] == pytest.approx(0.125)
    assert reversed_["share"] == 0 and reversed_["iou"] == 0 and reversed_["delta"] == -1
    assert against_mask(torch.zeros(20, 20), inside) == {} == against_mask(torch.ones(20, 20), torch.ones(20, 20) > 0)


def test_insertion_is_high_and_deletion_low_for_the_pixels_that_count():
    pixels, inside = torch.full((16, 16, 3), 200, dtype=torch.uint8), torch.zeros(16, 16)
    inside[:8, :8] = 1
    asked = []

    def probability(images):
        asked.append(len(images))
        return torch.tensor([float((image[:8, :8, 0] == 200).float().mean()) for image in images])

    good = insertion_deletion(inside, pixels, (0, 0, 0), probability)
    bad = insertion_deletion(1 - inside, pixels, (0, 0, 0), probability)
    assert good["insertion"] == pytest.approx(0.875) and good["deletion"] == pytest.approx(0.125)
    assert bad["insertion"] == pytest.approx(0.125) and bad["deletion"] == pytest.approx(0.875) and asked[0] == 16


def test_changes_affect_the_branch_that_uses_them(tmp_path):
    explain = Explainer(checkpoint(tmp_path, spots()), method="gradcam", target=("red",))
    other = torch.tensor(GROUNDS["green"], dtype=torch.uint8).expand(30, 30, 3)
    changes = {c.name: c.probability for c in explain(scene(), [BOX], background=other).changes}
    before = changes["original"]
    assert before["full"] > 0.8 and before["fg"] > 0.6
    assert changes["swapped"]["full"] < 0.1 and changes["swapped"]["fg"] > 0.6
    assert changes["bg_only_box"]["full"] > 0.8 and changes["bg_only_box"]["fg"] < 0.4
    assert changes["fg_only"]["full"] < 0.4 and changes["fg_only"]["fg"] > 0.6
    assert changes["box_moved"]["fg"] < 0.4 and changes["box_moved"]["full"] == before["full"]
    assert changes["box_grown"]["fg"] < before["fg"]


def test_the_outputs_are_those_of_predict(tmp_path):
    of = checkpoint(tmp_path, spots("robust"))
    image, boxes = Image.fromarray(scene("red", "blue").numpy()), [[40, 30, 50, 38], BOX]
    assert Explainer(of, numbers=False)(image, boxes).prediction == Predictor(of)(image, boxes).objects[0]


def test_large_images_are_explained_at_a_size_that_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("l2r2_models.audit.samples.MOST_PIXELS", 600)
    found = Explainer(checkpoint(tmp_path, spots()), numbers=False)(scene(), [BOX])
    assert found.pixels.shape == (20, 30, 3) == (*found.maps["full"].shape, 3)
    assert found.box.tolist() == [5, 3, 13, 11] and found.measures["fg"]["share"] > 0.7


# ---- invalid input ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "magic"}, 'Unknown method "magic"; choose from auto, gradcam'),
        ({"target": ("pink",)}, 'has no class "pink"; it has red, green, blue'),
        ({"target": ("red",), "against": "red"}, "both the class to explain and the one to contrast with"),
        ({"method": "rollout", "against": "runner-up"}, "the same for every class"),
        ({"method": "rollout"}, "attention rollout needs a plain ViT; choose gradcam"),
        ({"method": "parts"}, "Only iFAM models have part maps"),
    ],
)
def test_what_cannot_be_explained_is_a_sentence(tmp_path, options, sentence):
    with pytest.raises(L2R2Error, match=sentence):
        Explainer(checkpoint(tmp_path, spots()), numbers=False, **options)(scene(), [BOX])

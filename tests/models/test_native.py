"""Views at their own aspect ratio through a NaFlexViT: equal to timm's network on each view alone, in every way of use."""

import csv
import json

import pytest
import timm
import torch
from conftest import sentence, write_dataset
from PIL import Image, ImageOps
from timm.models.naflexvit import batch_patchify

from l2r2_models import L2R2Error, Predictor, ViewSpec, load_checkpoint, make_views
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.images import image_tensor, load_image
from l2r2_models.localize import create_localizer
from l2r2_models.models.native import native_features, patch_views
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe
from l2r2_models.views import stack_views

TINY = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}
NAME = "naflexvit_base_patch16_gap"
LEVELS = {"fill": (10, 20, 30), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
SPEC = ViewSpec(size=64, patch=16, **LEVELS)


def network(name=NAME, seed=0, **options):
    torch.manual_seed(seed)
    vit = timm.create_model(name, num_classes=0, **{**TINY, **options}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # positions and registers that matter
    return vit


def alone(vit, view):
    """Timm's own forward pass of one view `[C, h, w]`, as patches with their coordinates."""
    patches, (rows, columns) = batch_patchify(view[None], (16, 16))
    coord = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[None]
    return vit({"patches": patches, "patch_coord": coord, "patch_valid": torch.ones(1, rows * columns, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (NAME, {}),
        ("naflexvit_so150m2_patch16_reg1_gap", {}),
        ("naflexvit_base_patch16_map", {}),
        (NAME, {"class_token": True, "global_pool": "token"}),
        (NAME, {"pos_embed": "factorized"}),
    ],
)
def test_all_views_in_one_pass_are_each_view_alone(name, options):
    vit = network(name, **options)
    views = [torch.randn(3, h, w) for h, w in ((64, 64), (32, 112), (128, 32), (48, 80), (16, 64))]
    expected = torch.cat([alone(vit, view) for view in views])
    plain = torch.cat([vit(view[None]) for view in views])
    torch.testing.assert_close(expected, plain, atol=1e-5, rtol=1e-5)
    found = native_features(vit, {"full": stack_views(views[:3]), "fg": stack_views(views[3:])})
    assert [len(z) for z in found.values()] == [3, 2]
    torch.testing.assert_close(torch.cat(list(found.values())), expected, atol=1e-5, rtol=1e-5)


def test_no_padded_token_enters_a_block():
    vit = network("naflexvit_so150m2_patch16_reg1_gap")
    seen = []
    vit.blocks[0].norm1.register_forward_hook(lambda module, inputs, out: seen.append(out.numel() // out.shape[-1]))
    native_features(vit, {"full": stack_views([torch.randn(3, 16, 64), torch.randn(3, 64, 64)]), "fg": torch.randn(1, 3, 32, 16)})
    assert seen == [4 + 16 + 2 + 3], "their patches, and a register of each"


def test_gradients_are_those_of_each_view_alone():
    vit = network().train()
    views = [torch.randn(3, 64, 64), torch.randn(3, 32, 112), torch.randn(3, 128, 32)]
    weights = torch.randn(3, 48)
    (torch.cat([alone(vit, view) for view in views]) * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in vit.named_parameters()}
    vit.zero_grad()
    (native_features(vit, {"full": stack_views(views)})["full"] * weights).sum().backward()
    for name, p in vit.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_views_that_do_not_divide_are_refused():
    with pytest.raises(L2R2Error, match="do not divide into patches of 16 x 16"):
        patch_views(network(), torch.randn(1, 3, 40, 64))


@pytest.mark.parametrize("shared", [True, False])
def test_the_branches_of_a_model(shared):
    torch.manual_seed(0)
    model = timm.create_model("l2r2", backbone=NAME, num_classes=3, views=SPEC, shared=shared, **TINY).eval()
    image = torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8)
    views = make_views([image, image[:50]], torch.tensor([[5.0, 5, 70, 25], [3.0, 2, 11, 44]]), SPEC)
    out = model.forward_views(**views.inputs())
    for branch, logits in out.branches().items():
        for view, z in zip(getattr(views, branch), logits):
            rows, columns = (~view[0].isnan()).any(1).sum(), (~view[0].isnan()).any(0).sum()
            expected = model.heads[branch](alone(model.backbone_of(branch), view[:, :rows, :columns]))[0]
            torch.testing.assert_close(z, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "options", "why"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, "its class VisionTransformer is not timm's NaFlexVit"),
        ("resnet10t", {}, "its class ResNet is not timm's NaFlexVit"),
        (NAME, {**TINY, "patch_size": 8}, "its patches have 8 x 8 pixels, not 16"),
        (NAME, {**TINY, "rope_type": "axial"}, "its rotary embeddings would differ"),
        (NAME, {**TINY, "patch_drop_rate": 0.5}, "it drops random patches"),
        (NAME, {**TINY, "box_head": True}, "A box head needs square views"),
    ],
)
def test_what_does_not_take_such_views(backbone, options, why):
    with pytest.raises(L2R2Error, match=why):
        timm.create_model("l2r2", backbone=backbone, num_classes=3, views=SPEC, **options)


# ---- training, prediction, evaluation ----

BACKBONE = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images and boxes of several shapes, and its data."""
    folder = tmp_path_factory.mktemp("native")
    data = write_dataset(folder / "data", splits=("train", "val", "test"))
    rows = list(csv.DictReader((data / "metadata.csv").open()))
    for i, row in enumerate(rows):
        with Image.open(data / row["file_name"]) as image:  # grown to the right and below, where the boxes stay right
            ImageOps.expand(image, (0, 0, 60 * (i % 3 == 1), 70 * (i % 3 == 2))).save(data / row["file_name"])
        row["y1"] = int(row["y1"]) - 9 * (i % 2)
    with (data / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    recipe = Recipe.default(f"timm:{NAME}", False, backbone=BACKBONE, size=64, patch=16, epochs=2, batch_size=6, workers=0)
    finetune(data, recipe, folder / "run")
    return folder / "run", data


def logits_alone(model, path, box):
    """Logits by branch of one image file, each view by timm's network alone; and the size of the fg view."""
    image, spec, found = image_tensor(load_image(path)), model.view_spec, {}
    for branch in model.branches:
        view = getattr(make_views([image], box[None], spec, branches=(branch,)), branch)[0]
        found[branch] = model.heads[branch](alone(model.backbone_of(branch), view))[0].detach()
    return found, tuple(view.shape[1:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_and_prediction_are_timms_network_on_each_view(trained, l2r2, precision):
    run, data = trained
    checkpoint = load_checkpoint(run)
    model = checkpoint.model
    assert model.view_spec.patch == 16 and not model.view_spec.square
    table = read_table(data).of_split("test")
    paths = [row.path for row in table.rows]
    boxes = [row.entry.boxes for row in table.rows]
    first = [*boxes[0], [1.0, 1, 9, 35]]  # one image has two
    predictor = Predictor.from_pretrained(run, device="cpu", batch_size=5, precision=precision).keeping_logits()
    predicted = predictor(paths, boxes=[first, *boxes[1:]])
    stored = branch_logits(checkpoint, table, batch_size=5)
    tolerance = {"atol": 2e-5, "rtol": 0} if precision == "fp32" else {"atol": 0.05, "rtol": 0}
    sizes = set()
    for i, (path, found) in enumerate(zip(paths, predicted)):
        for j, box in enumerate(first if i == 0 else boxes[i]):
            expected, size = logits_alone(model, path, torch.tensor(box, dtype=torch.float32))
            sizes.add(size)
            for branch, z in expected.items():
                torch.testing.assert_close(torch.tensor(found.objects[j].logits[branch]), z, **tolerance)
                if j == 0:
                    torch.testing.assert_close(stored.logits[branch][i], z, atol=2e-5, rtol=0)
    assert len(sizes) >= 3


def test_the_commands_take_the_run(trained, tmp_path, l2r2):
    run, data = trained
    image = data / "images" / "test_001.png"
    for command in (
        ["evaluate", run, data, "--split", "test"],
        ["predict", run, data, "-o", tmp_path / "p.json"],
        *(["explain", run, image, "--method", m, "-o", tmp_path / f"{m}.html"] for m in ("gradcam", "ig", "occlusion")),
        ["audit", run, data, "--limit", 4, "--backgrounds", 1, "--work", tmp_path / "audit"],
        ["benchmark", run, data, "--device", "cpu"],
        ["finetune", data, "--init", run, "--epochs", 1, "-o", tmp_path / "next"],
    ):
        done = l2r2(*command)
        assert done.returncode == 0, (command, done.stderr)
    assert load_checkpoint(tmp_path / "next").model.view_spec == load_checkpoint(run).model.view_spec
    rollout = l2r2("explain", run, image, "--method", "rollout", "-o", tmp_path / "r.html")
    assert rollout.returncode == 1 and "Attention rollout needs square views" in rollout.stderr
    refused = sentence(l2r2("export", run, "-o", tmp_path / "model.onnx"))
    assert "cannot be exported, because its views keep their aspect ratio" in refused


@pytest.mark.parametrize(
    "changes",
    [
        {"branches": ("full", "fg", "bg"), "fg_mode": "masked_crop", "shared": False},
        {"branches": ("fg", "bg"), "bg": "box", "branch_backward": "separate", "sizes": {"bg": 32}},
        {"consistency": 0.5, "grad_checkpointing": True, "precision": "fp32"},
    ],
)
def test_training_with_other_branches_and_losses(trained, tmp_path, changes):
    _, data = trained
    common = {"backbone": BACKBONE, "size": 64, "patch": 16, "epochs": 1, "batch_size": 6, "workers": 0}
    finetune(data, Recipe.default(f"timm:{NAME}", False, **common, **changes), tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    logits = branch_logits(checkpoint, read_table(data).of_split("test")).logits
    assert set(logits) == set(checkpoint.model.branches) and all(z.isfinite().all() for z in logits.values())


@pytest.mark.parametrize("spec", ["ncut", "cam"])
def test_localizers_on_such_a_network_see_squares(trained, spec):
    run, data = trained
    images = [load_image(path) for path in sorted((data / "images").iterdir())[:4]]
    assert len({image.size for image in images}) > 1
    localizer = create_localizer(f"{spec}:{run}", device="cpu")
    for image, found in zip(images, localizer(images)):
        (alone,) = localizer([image])
        torch.testing.assert_close(found.boxes, alone.boxes)
        assert found.image_size == (image.height, image.width)


def test_what_a_recipe_cannot_combine(dataset, tmp_path, l2r2):
    options = ["--no-pretrained", "--set", "patch=16", "-o", tmp_path / "run"]
    tiny = ["--model", f"timm:{NAME}", "--set", f"backbone={json.dumps(BACKBONE)}", "--set", "size=64"]
    line = sentence(l2r2("finetune", dataset, *tiny, *options, "--set", "mixup=0.2"))
    assert "mixup and cutmix cannot mix views of several aspect ratios" in line
    line = sentence(l2r2("finetune", dataset, "--model", "timm:resnet10t", "--set", "size=64", *options))
    assert "resnet10t does not take views at their own aspect ratio: its class ResNet" in line
    assert not (tmp_path / "run").exists()

"""Boxes from a network's own features: planted objects are found exactly, reference implementations agree, padding is ignored."""

from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import write_run
from PIL import Image
from torch import nn

from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.images import load_image
from l2r2_models.localize import create_localizer
from l2r2_models.localize.regions import largest_region, otsu
from l2r2_models.localize.unsupervised import activation_map, normalized_cut, patch_features


def planted(height, width, box, noise, seed=0):
    """Features of two kinds: one direction inside a box, another outside."""
    torch.manual_seed(seed)
    x0, y0, x1, y1 = box
    inside, outside = torch.randn(2, 16)
    features = outside[:, None, None].repeat(1, height, width)
    features[:, y0:y1, x0:x1] = inside[:, None, None]
    return features + noise * torch.randn_like(features)


@pytest.mark.parametrize("box", [(2, 3, 6, 7), (0, 0, 3, 2), (9, 1, 12, 9), (5, 5, 6, 6)])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_planted_object_is_cut_out_exactly(box, noise):
    mask = normalized_cut(planted(9, 12, box, noise), 0.5)
    x0, y0, x1, y1 = box
    expected = torch.zeros(9, 12, dtype=torch.bool)
    expected[y0:y1, x0:x1] = True
    assert torch.equal(mask, expected)


def test_the_cut_is_the_generalized_eigenvector_of_the_paper():
    from scipy.linalg import eigh
    from scipy.ndimage import label

    features = planted(7, 8, (1, 2, 4, 6), 1.2, seed=3)
    nodes = nn.functional.normalize(features.flatten(1).T.double(), dim=1)
    weights = torch.where(nodes @ nodes.T > 0.2, 1.0, 1e-5).double().numpy()
    degree = torch.from_numpy(weights).sum(1).diag().numpy()
    second = eigh(degree - weights, degree, subset_by_index=[1, 1])[1][:, 0]
    seed = abs(second).argmax()
    side = (second > second.mean()) if second[seed] > second.mean() else (second <= second.mean())
    regions = label(side.reshape(7, 8))[0]
    assert normalized_cut(features, 0.2).tolist() == (regions == regions.flatten()[seed]).tolist()


def test_only_one_of_two_alike_objects_is_the_box():
    features = planted(8, 12, (1, 1, 4, 4), 0.0)
    features[:, 5:7, 8:11] = features[:, 1:2, 1:2]
    mask = normalized_cut(features, 0.5)
    assert int(mask.sum()) in (9, 6)


class Colors(nn.Module):
    """A network whose feature map is the image itself, averaged over cells of 16 pixels."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{"reduction": 16, "module": "pool", "num_chs": 3}]

    def forward_intermediates(self, x, indices, output_fmt, intermediates_only):
        return [nn.functional.avg_pool2d(x, 16)]


@pytest.mark.parametrize("size", [(192, 96), (96, 192), (128, 128)])
def test_boxes_come_back_in_pixels_and_padding_is_no_object(tmp_path, size):
    localizer = create_localizer(f"ncut:{write_run(tmp_path / 'run')}?tau=0.5", device="cpu")
    localizer.model.backbone = Colors()
    side = max(size)
    localizer.model.view_spec = ViewSpec(size=side, fill=(255, 0, 255))  # padding in the most striking color
    image = Image.new("RGB", size, (30, 90, 30))
    image.paste((200, 30, 30), (32, 16, 80, 64))
    (found,) = localizer([image])
    offset = torch.tensor([(side - size[0]) // 2, (side - size[1]) // 2]).repeat(2)
    box = torch.tensor([32, 16, 80, 64]) + offset  # in the view
    cells = torch.cat([box[:2] // 16 * 16, -(-box[2:] // 16) * 16]) - offset
    assert found.scores.tolist() == [1.0]
    assert (found.boxes[0] - cells).abs().max() <= 16 and found.image_size == (size[1], size[0])
    if size == (128, 128):
        assert found.boxes[0].tolist() == [32, 16, 80, 64]


@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224", "convnextv2_atto", "swin_tiny_patch4_window7_224"])
def test_any_backbone_can_be_cut_and_batches_find_what_single_images_do(tmp_path, pictures, backbone):
    torch.manual_seed(0)
    model = timm.create_model("l2r2", backbone=backbone, num_classes=3)
    hub.save_checkpoint(model, tmp_path / "run", ["a", "b", "c"])
    for name in ("ncut", "cam", "outlier"):
        size = "?size=224" if name == "outlier" else ""
        localizer = create_localizer(f"{name}:{tmp_path / 'run'}{size}", device="cpu")
        together = localizer(pictures)
        for image, found in zip(pictures, together):
            (alone,) = localizer([image])
            torch.testing.assert_close(found.boxes, alone.boxes, atol=0.05, rtol=0)
            assert found.image_size == (image.height, image.width) and torch.equal(found.boxes, found.clipped().boxes)


def test_a_vit_is_cut_by_its_keys():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    view = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(view)))
        for block in vit.blocks[:-1]:
            tokens = block(tokens)
        keys = vit.blocks[-1].attn.qkv(vit.blocks[-1].norm1(tokens))[:, 1:, 192:384]
        torch.testing.assert_close(patch_features(vit, view), keys.transpose(1, 2).reshape(1, 192, 4, 4))


def test_another_size_is_of_the_cut_alone_and_one_that_does_not_fit_is_a_sentence(tmp_path, pictures):
    for backbone in ("vit_tiny_patch16_224", "hiera_tiny_224"):
        hub.save_checkpoint(timm.create_model("l2r2", backbone=backbone, num_classes=3), tmp_path / backbone, ["a", "b", "c"])
    checkpoint = hub.load_checkpoint(tmp_path / "vit_tiny_patch16_224")
    localizer = create_localizer("ncut?size=96", device="cpu", checkpoint=checkpoint)
    for image, found in zip(pictures, localizer(pictures)):
        assert found.image_size == (image.height, image.width) and torch.equal(found.boxes, found.clipped().boxes)
    assert localizer.model.backbone.patch_embed.grid_size == (6, 6)
    assert checkpoint.model.backbone.patch_embed.grid_size == (14, 14)  # the classifier's own
    with pytest.raises(L2R2Error, match="this network does not take views of 96 pixels"):
        create_localizer(f"ncut:{tmp_path / 'hiera_tiny_224'}?size=96")


def test_a_name_of_timm_stands_for_its_network_where_no_folder_is_called_so(tmp_path, pictures, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    monkeypatch.chdir(tmp_path)
    for name in ("resnet10t.c3_in1k", "eva02_tiny_patch14_224"):  # the latter has no keys to be hooked
        localizer = create_localizer(f"ncut:{name}?size=112", device="cpu")
        assert str(localizer.spec) == f"ncut:timm:{name}?size=112" and len(localizer(pictures)) == len(pictures)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert str(create_localizer(f"ncut:{write_run(tmp_path / 'resnet10t').name}", device="cpu").spec) == "ncut:resnet10t"


@pytest.mark.parametrize("name", ["ncut", "cam", "outlier"])
def test_a_network_that_has_diverged_finds_nothing(tmp_path, pictures, name):
    checkpoint = hub.load_checkpoint(write_run(tmp_path / "run"))
    torch.nn.init.constant_(checkpoint.model.backbone.conv1[0].weight, float("nan"))
    hub.save_checkpoint(checkpoint.model, tmp_path / "diverged", checkpoint.labels)
    with pytest.raises(L2R2Error, match="are not finite; its training has diverged"):
        create_localizer(f"{name}:{tmp_path / 'diverged'}", device="cpu")(pictures)


@pytest.mark.parametrize("backbone", ["resnet10t", "vit_tiny_patch16_224"])
def test_the_activation_map_is_captums(backbone):
    from captum.attr import LayerGradCam

    torch.manual_seed(0)
    model = timm.create_model("l2r2", backbone=backbone, num_classes=5).eval()
    views = torch.rand(2, 3, 224, 224)
    layer = model.backbone.layer4 if backbone == "resnet10t" else model.backbone.blocks[-1].norm1
    theirs = LayerGradCam(model, layer).attribute(
        views, model(views).argmax(1), relu_attributions=False, attr_dim_summation=backbone == "resnet10t"
    )
    if backbone != "resnet10t":  # captum takes dimension 1, the tokens, for channels
        with torch.enable_grad():
            kept = []
            handle = layer.register_forward_hook(lambda m, i, o: kept.append(o))
            (gradient,) = torch.autograd.grad(model(views).amax(1).sum(), kept)
            handle.remove()
        theirs = (gradient[:, 1:].mean(1, keepdim=True) * kept[0][:, 1:]).sum(2).reshape(2, 1, 14, 14)
    with torch.inference_mode():  # as in a Predictor
        ours = activation_map(model, views)
    torch.testing.assert_close(ours, theirs[:, 0].detach().relu(), atol=1e-5, rtol=1e-4)


def test_the_map_of_a_network_that_sees_red_is_on_what_is_red(tmp_path):
    """A head whose answer is the mean redness: the map must lie on the red square, in an image that is not square."""
    localizer = create_localizer(f"cam:{write_run(tmp_path / 'run')}", device="cpu")

    class Red(nn.Module):
        global_pool = "avg"

        def forward_features(self, x):
            return nn.functional.avg_pool2d(x[:, :1], 4).relu()

        def forward_head(self, features):
            return features.mean((2, 3))

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

    localizer.model.backbone = Red()
    localizer.model.heads["full"] = nn.Linear(1, 3)
    nn.init.ones_(localizer.model.heads["full"].weight)
    localizer.model.view_spec = ViewSpec(size=96, mean=(0.5,) * 3, std=(0.5,) * 3, fill=(0, 0, 0))
    image = Image.new("RGB", (96, 48), (0, 40, 0))
    image.paste((255, 0, 0), (60, 8, 84, 32))
    image.paste((255, 0, 0), (4, 4, 8, 8))  # a smaller one
    (found,) = localizer([image])
    assert (found.boxes[0] - torch.tensor([60, 8, 84, 32])).abs().max() <= 4
    (half,) = create_half(localizer, "level=0.9")([image])
    assert (half.boxes[0] - torch.tensor([60, 8, 84, 32])).abs().max() <= 4
    assert len(localizer([Image.new("RGB", (96, 48), (0, 40, 0))])[0]) == 0  # nothing is red: no box


def create_half(localizer, options):
    other = create_localizer(f"{localizer.spec}?{options}", device="cpu")
    other.model = localizer.model
    return other


def test_otsus_level_is_scikit_images():
    from skimage.filters import threshold_otsu

    torch.manual_seed(0)
    for values in (torch.rand(40, 30), torch.cat([torch.randn(500) * 0.1, 1 + torch.randn(200) * 0.2])):
        assert otsu(values) == pytest.approx(float(threshold_otsu(values.numpy())), abs=0.02)
    assert otsu(torch.full((3, 3), 2.0)) == 2.0


def test_the_largest_region_is_by_weight_and_an_empty_mask_has_none():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()
    assert largest_region(mask, mask.float()).nonzero().tolist() in ([[0, 0], [0, 1]], [[0, 3], [1, 3]])
    weight = torch.zeros(3, 4)
    weight[2, 0] = 5
    assert largest_region(mask, weight).nonzero().tolist() == [[2, 0]]
    assert not largest_region(torch.zeros(3, 4).bool(), weight).any()


def test_parts_of_an_ifam_model_are_box_and_mask(tmp_path, monkeypatch):
    model = timm.create_model("ifam_vit_tiny_patch16_224", num_classes=3)
    hub.save_checkpoint(model, tmp_path / "run", ["a", "b", "c"])
    localizer, image = create_localizer(f"parts:{tmp_path / 'run'}", device="cpu"), Image.new("RGB", (224, 112))
    assert localizer([image])[0].image_size == (112, 224)
    keep = torch.zeros(1, 14, 14, dtype=torch.bool)
    keep[0, 4:8, 2:9] = keep[0, 9, 12] = True  # the image's rows are the view's 56 to 168
    monkeypatch.setattr(localizer.model, "find_parts", lambda views: SimpleNamespace(keep=keep))
    (found,) = localizer([image])
    assert found.boxes.tolist() == [[32, 8, 144, 72]] and found.masks.shape == (1, 112, 224)
    assert found.masks[0, 40, 80] and found.masks[0, 96, 200] and not found.masks[0, 40, 180]
    with pytest.raises(L2R2Error, match="finds no parts"):
        create_localizer(f"parts:{write_run(tmp_path / 'plain')}")


def test_a_predictor_localizes_with_its_own_network(run, dataset):
    path = dataset / "images" / "train_000.png"
    for name in ("ncut", "cam"):
        own = Predictor.from_pretrained(run, device="cpu", localizer=name)(path)
        (found,) = create_localizer(f"{name}:{run}", device="cpu")([load_image(path)])
        if len(found):
            assert own.objects[0].box == pytest.approx(found.boxes[0].tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ncut", "needs a run, a Hub id or timm:NAME"),
        ("cam", "needs a run or a Hub id"),
        ("head:nowhere/at-all", "hf download nowhere/at-all"),
        ("ncut:timm:resnet1800", "timm cannot load this model"),
        ("cam:x?level=2", "level must be otsu or a number between 0 and 1"),
        ("ncut:x?tau=7", "tau must be a cosine"),
        ("outlier?size=9", "size must be a number of pixels from 32 to 2048"),
    ],
)
def test_unsuitable_localizers_are_refused(spec, message):
    with pytest.raises(L2R2Error, match=message):
        create_localizer(spec)

"""The localizer `attn`: timm's own attention, a planted object that a network looks at, and networks without such attention."""

import pytest
import timm
import torch
from conftest import sentence, write_run
from PIL import Image

from l2r2_models import L2R2Error, Predictor, ViewSpec
from l2r2_models.checkpoints import checkpoint as hub
from l2r2_models.localize import create_localizer
from l2r2_models.localize.unsupervised import class_attention

VIT = dict(backbone="vit_tiny_patch16_224", img_size=96, embed_dim=16, depth=2, num_heads=2)


def looks_at_red(folder, **options):
    """A run with a ViT whose class token attends to red patches: its keys are the redness, its query is constant."""
    torch.manual_seed(0)
    model = timm.create_model("l2r2", num_classes=3, **{**VIT, **options})
    vit = model.backbone
    with torch.no_grad():
        for value in vit.parameters():
            value.zero_()
        vit.patch_embed.proj.weight[0] = torch.tensor([1.0, -0.5, -0.5])[:, None, None] / 256
        vit.patch_embed.proj.bias[1] = 0.5  # the norm compares the redness with a constant
        for block in vit.blocks:
            block.norm1.weight.fill_(1.0)
        attention = vit.blocks[-1].attn
        attention.qkv.bias[:16] = 1.0  # query
        attention.qkv.weight[16:32, 0] = 2.0  # key
    model.view_spec = ViewSpec(size=96, fill=(255, 0, 0), mean=(0.0,) * 3, std=(1.0,) * 3)  # even the padding is red
    hub.save_checkpoint(model, folder, ["a", "b", "c"])
    return folder


@pytest.mark.parametrize(
    ("size", "box", "other"),  # in whole patches of the view, which is half as large as the padded image
    [
        ((192, 192), (32, 32, 96, 64), (0, 64, 32, 96)),
        ((192, 64), (64, 0, 160, 32), (0, 32, 32, 64)),
        ((64, 192), (0, 64, 32, 160), (32, 0, 64, 32)),
    ],
)
def test_a_planted_object_is_found_and_padding_is_none(tmp_path, size, box, other):
    localizer = create_localizer(f"attn:{looks_at_red(tmp_path / 'run')}", device="cpu")
    image = Image.new("RGB", size, (60, 90, 60))
    image.paste((220, 20, 20), box)
    image.paste((220, 20, 20), other)  # smaller, and does not touch it
    (found,) = localizer([image])
    torch.testing.assert_close(found.boxes, torch.tensor([box], dtype=torch.float))
    assert found.scores.tolist() == [1.0]


def test_the_attention_is_that_of_timm():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), num_classes=0, class_token=True, reg_tokens=2).eval()
    views, seen = torch.randn(2, 3, 64, 96), []
    attention = model.blocks[-1].attn
    fused = attention.fused_attn
    with torch.no_grad():
        found = class_attention(model, views)
        assert attention.fused_attn == fused and not attention.attn_drop._forward_hooks, "the network is as before"
        attention.qkv.register_forward_hook(lambda module, inputs, out: seen.append(out))
        model(views)
    queries, keys, _ = seen[0].reshape(2, -1, 3, 3, 64).permute(2, 0, 3, 1, 4)  # [B, heads, N, D]
    expected = (queries[:, :, :1] @ keys.transpose(-2, -1) / 8).softmax(-1).mean(1)[:, 0, 3:].reshape(2, 4, 6)
    torch.testing.assert_close(found, expected)


def test_options_and_its_use_in_predict(tmp_path):
    run = looks_at_red(tmp_path / "run")
    image = Image.new("RGB", (96, 96), (60, 90, 60))
    image.paste((220, 20, 20), (16, 16, 64, 32))
    (whole,) = create_localizer(f"attn:{run}?level=0", device="cpu")([image])
    assert whole.boxes.tolist() == [[0, 0, 96, 96]]
    (finer,) = create_localizer(f"attn:{run}?size=192", device="cpu")([image])
    assert finer.boxes.tolist() == [[16, 16, 64, 32]]
    predict = Predictor.from_pretrained(run, localizer="attn", device="cpu")  # its own network
    assert predict(image).objects[0].box == (16, 16, 64, 32)


def test_networks_without_a_class_token_are_refused(tmp_path, l2r2, dataset):
    for spec in (f"attn:{write_run(tmp_path / 'run')}", f"attn:{tmp_path / 'run'}?size=64"):
        with pytest.raises(L2R2Error, match="attn needs a plain ViT with a class token"):
            create_localizer(spec, device="cpu")
    model = timm.create_model("l2r2", num_classes=3, **VIT, class_token=False, global_pool="avg")
    hub.save_checkpoint(model, tmp_path / "pooled", ["a", "b", "c"])
    channels = timm.create_model("l2r2", num_classes=3, backbone="xcit_nano_12_p16_224", depth=1)
    hub.save_checkpoint(channels, tmp_path / "xcit", ["a", "b", "c"])
    with pytest.raises(L2R2Error, match="attn needs a plain ViT with a class token"):
        create_localizer(f"attn:{tmp_path / 'xcit'}", device="cpu")
    done = l2r2("localize", dataset, "--localizer", f"attn:{tmp_path / 'pooled'}", "-o", tmp_path / "b.json", "--device", "cpu")
    assert "attn needs a plain ViT with a class token" in sentence(done)

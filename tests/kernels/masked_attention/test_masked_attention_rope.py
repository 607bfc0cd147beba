"""Eva blocks (EVA-02, DINOv3, PE): rotary embeddings gathered with the kept tokens, against timm's own forward."""

import pytest
import torch
from l2r2_kernels.masked_attention import run_masked, run_packed
from masked_attention_helpers import DEVICES
from timm.layers import DropPath
from timm.models.eva import Eva
from timm.models.vision_transformer import Block

SIZES = {"img_size": 56, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
VARIANTS = {
    "eva": {"use_rot_pos_emb": False},
    "eva02": {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "ref_feat_shape": (7, 7)},
    "scaled": {"use_rot_pos_emb": True, "init_values": 0.3, "scale_attn_inner": True},
    "dinov3": {
        "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False, "num_reg_tokens": 4,
        "init_values": 0.1, "qkv_bias": False, "swiglu_mlp": True, "swiglu_align_to": 8,
    },
    "pe": {
        "use_rot_pos_emb": True, "attn_type": "rope", "use_pre_transformer_norm": True, "rope_grid_indexing": "xy",
        "qk_norm": True,
    },
    "mixed": {"use_rot_pos_emb": True, "rope_type": "mixed", "attn_type": "rope", "dynamic_img_size": False},
    "grouped": {"use_rot_pos_emb": True, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
}  # fmt: skip


def eva(**options):
    torch.manual_seed(0)
    try:
        model = Eva(**SIZES, **options)
    except TypeError as error:
        pytest.skip(f"this timm has no such option: {error}")
    for p in model.parameters():  # away from the zeros and ones that hide a forgotten layer
        torch.nn.init.normal_(p, std=0.2) if p.dim() > 1 else p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def entered(model, images):
    """Tokens and rotary embeddings as they enter the first block."""
    x, rope = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(x), rope


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_masked_equals_timm(variant, device):
    model = eva(**VARIANTS[variant]).to(device)
    if variant == "scaled":
        for block in model.blocks:
            block.attn.qkv_bias_separate = True
    x, rope = entered(model, torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(device))
    prefix = model.num_prefix_tokens
    mask = (torch.rand(3, prefix + 49, generator=torch.Generator().manual_seed(3)) < 0.3).to(device)
    packed, unpacked = run_packed(model.blocks, x, mask.cpu(), num_prefix=prefix, unpacked=True, rope=rope)
    masked = run_masked(model.blocks, x, mask, num_prefix=prefix, rope=rope)
    mask[:, :prefix] = True
    timm_own = x
    for i, block in enumerate(model.blocks):
        timm_own = block(timm_own, rope=rope[i] if variant == "mixed" else rope, attn_mask=mask[:, None, None, :])
    scale = timm_own.abs().max()
    torch.testing.assert_close(masked / scale, timm_own / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(unpacked[mask] / scale, timm_own[mask] / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.prefix() / scale, timm_own[:, :prefix] / scale, atol=1e-5, rtol=0)


def test_gradients_compiled_and_checkpointed_with_drop_path():
    model = eva(**VARIANTS["eva02"])
    x, rope = entered(model, torch.randn(2, 3, 56, 56))
    x, mask = x.detach(), torch.rand(2, x.shape[1], generator=torch.Generator().manual_seed(5)) < 0.4
    weights = list(model.blocks.parameters())

    def gradients(runner, **options):
        out = runner(model.blocks, x, mask, num_prefix=1, rope=rope, **options)
        out = out[1] if isinstance(out, tuple) else out
        return torch.autograd.grad(out[:, 0].square().mean(), weights)

    expected = gradients(run_masked)
    compiled = torch.compile(run_packed, fullgraph=True, backend="aot_eager")
    for got in (
        gradients(run_packed, unpacked=True),
        gradients(run_packed, unpacked=True, checkpoint=True),
        gradients(compiled, unpacked=True, capacity=64),
    ):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item() + 1e-6, rtol=1e-3)
    model.train().blocks[0].drop_path1 = DropPath(0.5)
    assert all(g.isfinite().all() for g in gradients(run_packed, unpacked=True))


def test_a_rope_that_does_not_fit_is_named():
    model = eva(use_rot_pos_emb=True)
    x, mask = torch.zeros(1, 50, 48), torch.ones(1, 50, dtype=torch.bool)
    for runner in (run_packed, run_masked):
        for rope in (torch.zeros(51, 32), torch.zeros(32), torch.zeros(2, 3, 49, 32)):
            with pytest.raises(ValueError, match=r"rope must be \[P, 2 D\], .* for P <= 50 patches"):
                runner(model.blocks, x, mask, rope=rope)
        with pytest.raises(TypeError, match=r"it takes no rotary embeddings; do not pass rope"):
            runner([Block(48, 3)], x, mask, rope=torch.zeros(49, 32))

"""A ViT on a CPU with 30 % of the patches kept: packed compared with dense and masked keys, and the cost of pack and unpack.

    OMP_NUM_THREADS=1 pytest benchmarks/speed/test_cpu_masked_attention.py -s

One thread, float32, batch 8, timm's vit_small_patch16_224 (197 tokens). ``test_goal`` runs the two in turn.
"""

import statistics
import time

import pytest
import timm
import torch
from l2r2_kernels.masked_attention import pack, run_packed, unpack

GOAL = 2.0  # KERNELS: must; 2.8 is the stretch
BATCH, KEPT = 8, 0.3


@pytest.fixture(scope="module")
def case():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").eval()
    x = torch.randn(BATCH, 197, model.embed_dim)
    mask = torch.rand(BATCH, 197).argsort(1) < round(KEPT * 196)  # the same fraction in every image
    mask[:, 0] = True

    def dense():
        tokens = x
        for block in model.blocks:
            tokens = block(tokens, attn_mask=mask[:, None, None, :])
        return tokens[:, 0]

    def packed():
        return run_packed(model.blocks, x, mask, num_prefix=1)[0].prefix()[:, 0]

    def pack_unpack():
        return unpack(pack(x, mask, num_prefix=1))

    with torch.inference_mode():
        torch.testing.assert_close(packed(), dense(), atol=1e-5, rtol=1e-5)  # check the results first
        yield {"dense": dense, "packed": packed, "pack_unpack": pack_unpack}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["dense", "packed", "pack_unpack"])
def test_time(benchmark, case, name):
    benchmark.group = f"vit_small_patch16_224, batch {BATCH}, {KEPT:.0%} kept, 1 thread"
    benchmark.pedantic(case[name], warmup_rounds=1, rounds=5)


def test_goal(case):
    seconds = {name: [] for name in case}
    for _ in range(7):
        for name, function in case.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ratio, share = median["dense"] / median["packed"], median["pack_unpack"] / median["packed"]
    print(f"\npacked is {ratio:.2f} times as fast as dense (goal {GOAL}); pack + unpack: {share:.2%} of the packed forward")
    assert ratio >= GOAL
    assert share <= 0.02

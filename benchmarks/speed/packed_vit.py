"""A whole ViT on 20, 30 or 50 % of its patches: packed tokens compared with masked keys (SDPA), for 196 to 1369 patches.

    OMP_NUM_THREADS=1 python benchmarks/speed/packed_vit.py [--model vit_small_patch16_224] [--batch 4] [--rounds 5]

Patch embedding, blocks, norm and class token; forward, and training step (forward, backward, SGD). Both must give the same
class token before they are timed; they are run in turn, and the medians are compared. On a GPU the mask is on the CPU, where
counting it is free, and the weights are bfloat16. Writes benchmarks/results/packed_vit_DEVICE.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from l2r2_kernels.masked_attention import run_packed
from torch import Tensor

from l2r2_models.models.masking import embed_tokens

SIDES = (14, 28, 37)  # 196, 784 and 1369 patches
KEPT = (0.2, 0.3, 0.5)
RESULTS = Path(__file__).parent.parent / "results"


def ways(model: torch.nn.Module, x: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    on_device = mask.to(x.device)[:, None, None, :]

    def dense() -> Tensor:
        tokens, rope = embed_tokens(model, x)
        rotary = {} if rope is None else {"rope": rope}
        for block in model.blocks:  # type: ignore[union-attr]
            tokens = block(tokens, attn_mask=on_device, **rotary)
        return model.norm(tokens)[:, 0]  # type: ignore[operator]

    def packed() -> Tensor:
        tokens, rope = embed_tokens(model, x)
        return model.norm(run_packed(model.blocks, tokens, mask, num_prefix=1, rope=rope)[0].prefix())[:, 0]  # type: ignore

    return {"dense": dense, "packed": packed}


def timed(function: Callable[[], Tensor], model: torch.nn.Module, training: bool, device: torch.device) -> float:
    optimizer = torch.optim.SGD(model.parameters(), 1e-6) if training else None
    start = time.perf_counter()
    if optimizer is None:
        with torch.inference_mode():
            function()
    else:
        function().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, batch: int, side: int, share: float, rounds: int, device: torch.device) -> list[dict]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = timm.create_model(name, num_classes=0, img_size=16 * side).to(device, dtype)
    x = torch.randn(batch, 3, 16 * side, 16 * side, device=device, dtype=dtype)
    mask = torch.rand(batch, side * side + 1).argsort(1) < round(share * side * side)
    mask[:, 0] = True
    functions = ways(model, x, mask)
    atol = 1e-4 if dtype == torch.float32 else 0.1
    with torch.inference_mode():  # check the results first
        torch.testing.assert_close(functions["packed"](), functions["dense"](), atol=atol, rtol=0.1)
    rows = []
    for training in (False, True):
        model.train(training)
        seconds: dict[str, list[float]] = {way: [] for way in functions}
        for i in range(rounds + 1):
            for way, function in functions.items():
                taken = timed(function, model, training, device)
                if i:  # the first one warms up
                    seconds[way].append(taken)
        median = {way: statistics.median(times) for way, times in seconds.items()}
        what = "training step" if training else "forward"
        row = {"what": what, "patches": side * side, "kept": share, **{f"{w}_ms": round(1000 * s, 2) for w, s in median.items()}}
        rows.append({**row, "times_as_fast": round(median["dense"] / median["packed"], 2)})
        print("   ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="patches along a side")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    about = {
        "model": arguments.model, "batch": arguments.batch, "rounds": arguments.rounds, "device": where,
        "torch": version("torch"), "timm": version("timm"), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    table: list[dict] = []
    for side in arguments.sides:
        for share in KEPT:
            table += measure(arguments.model, arguments.batch, side, share, arguments.rounds, device)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"packed_vit_{device.type}.csv"
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, [*table[0], *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in table)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()

"""Where to mask: before the network, late in it, or its tokens; and iFAM, which needs no masks. ETH-80 objects on scenes.

    python benchmarks/robustness/masking.py OBJECTS SCENES [--seeds 0 1 2] [--work runs/masking] [--only vit:tokens ...]
    python benchmarks/robustness/masking.py OBJECTS SCENES --start pretrained [--only "lite0:masked (early)" ...]

OBJECTS and SCENES are data sets as `l2r2 composite` takes them. The composites have its default correlations (0.97 and 0.87),
and ground-truth masks and boxes. Each row is a network trained on one kind of view (branch full or fg) with the same `finetune`
that users call: small networks from scratch (64 pixels, 8 epochs), or EfficientNet-Lite0 from the installed ImageNet weights
(recipe `few_images`, 128 pixels, 4 epochs). They are evaluated with the weights of the last epoch; nothing is chosen on any
split. The published finding (Aniraj et al., ICCVW 2023) is that early masking beats late masking out of distribution. The same
command continues an interrupted benchmark. Writes benchmarks/results/masking_START.csv.

iFAM is trained on the same images without boxes and masks; the patches it keeps are compared with the ground-truth masks, see
`FoundParts.agreement`. All values are in %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from background_shift import EPOCHS, NETWORKS, PIXELS, PRECISIONS, RESULTS, about_run, recipe_of, write_table

from l2r2_models.checkpoints.checkpoint import load_checkpoint
from l2r2_models.data.spawrious import composites
from l2r2_models.data.table import read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.evaluate.parts import AGREEMENT, find_parts
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipe import Recipe

SPLITS = ("test_id", "test_ood")
SMALL_VIT = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
SMALL_CONVNEXT = {"patch_size": 2, "depths": [1, 1, 3, 1], "dims": [32, 64, 128, 256]}  # at 64 pixels its last map is 4 x 4
BACKBONES: dict[str, dict[str, dict]] = {
    "scratch": {
        "convnext": {"model": "l2r2_convnext_tiny", "backbone": SMALL_CONVNEXT},
        "vit": {"model": "l2r2_vit_tiny_patch16_224", "backbone": SMALL_VIT},
    },
    "pretrained": {"lite0": {"model": NETWORKS["pretrained"]}},
}
SETTINGS: dict[str, dict] = {
    "scratch": {"batch_size": 32, "size": 64, "epochs": 8},
    "pretrained": {"size": PIXELS["pretrained"]["composites"], "epochs": EPOCHS["pretrained"]["composites"]},
}
KINDS: dict[str, dict] = {
    "full": {"branches": ("full",)},
    "crop": {"branches": ("fg",), "fg_mode": "crop"},
    "masked_crop": {"branches": ("fg",), "fg_mode": "masked_crop"},
    "masked (early)": {"branches": ("fg",), "fg_mode": "masked"},
    "late, last stage": {"branches": ("fg",), "fg_mode": "late"},
    "late, one before": {"branches": ("fg",), "fg_mode": "late", "late_stage": "before_last"},
    "tokens": {"branches": ("fg",), "fg_mode": "tokens"},
}
IFAM_RECIPE = {"model": "ifam_vit_tiny_patch16_224", "backbone": SMALL_VIT, "num_parts": 4}


def plan(start: str, only: list[str] | None) -> dict[str, dict]:
    """Return the recipe keys of each network by name."""
    networks = {
        f"{backbone}:{kind}": {**of_backbone, **of_kind}
        for backbone, of_backbone in BACKBONES[start].items()
        for kind, of_kind in KINDS.items()
        if backbone == "vit" or kind != "tokens"
    }
    if start == "scratch":
        networks["vit:ifam"] = IFAM_RECIPE
    return {name: keys for name, keys in networks.items() if not only or name in only}


def measure(data: Path, work: Path, name: str, recipe: Recipe, seed: int) -> list[dict]:
    """Train one network with one seed, and evaluate its branches and, for iFAM, the patches it keeps."""
    run = work / f"{name.replace(':', '_').replace(', ', '_').replace(' ', '_')}_s{seed}"
    print(f"{name}, seed {seed}", flush=True)
    finetune(data, recipe, run)
    checkpoint = load_checkpoint(run)
    splits = {split: read_table(data).of_split(split) for split in SPLITS}
    found = {split: branch_logits(checkpoint, table, run / "logits") for split, table in splits.items()}
    parts = {split: find_parts(checkpoint, table).agreement() for split, table in splits.items()} if name == "vit:ifam" else {}
    rows = []
    for branch in found[SPLITS[0]].logits:
        row: dict = {"network": name, "answer": branch, "seed": seed}
        for split, data in found.items():
            logits = data.logits[branch]
            if "full" in data.logits:  # if iFAM keeps no patch, the prediction is that of stage 1
                logits = torch.where(data.has_fg[:, None], logits, data.logits["full"])
            row[split] = round(100 * (logits.argmax(1) == data.labels).float().mean().item(), 1)
            kept = parts.get(split, {}) if branch == "fg" else {}
            row |= {f"{split}_{metric}": round(100 * kept[metric], 1) if kept else None for metric in AGREEMENT}
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", type=Path)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", choices=list(BACKBONES), default="scratch")
    parser.add_argument("--only", nargs="+", choices=[name for start in BACKBONES for name in plan(start, None)])
    parser.add_argument("--work", type=Path, default=Path("runs/masking"))
    arguments = parser.parse_args()
    data = composites(arguments.objects, arguments.scenes, arguments.work / "data")
    rows = len(read_table(data).of_split("train"))
    settings, start = SETTINGS[arguments.start], arguments.start
    about = about_run(
        start=start, pixels=settings["size"], epochs=settings["epochs"], training_rows=rows, precision=PRECISIONS[start]
    )
    out = RESULTS / f"masking_{start}.csv"
    table: list[dict] = []
    for seed in arguments.seeds:
        for name, keys in plan(start, arguments.only).items():
            recipe = recipe_of(start, **{**settings, **keys, "seed": seed})
            table += measure(data, arguments.work, name, recipe, seed)
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_table(table, out, about)
            row = table[-1]
            print("   ".join(f"{split} {row[split]:5.1f}" for split in SPLITS), flush=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""Where to mask: before the network, late in it, or its tokens; and iFAM, which gets no masks. ETH-80 objects on scenes.

    python benchmarks/robustness/masking.py OBJECTS SCENES [--seeds 0 1 2] [--work runs/masking] [--only vit:tokens ...]

OBJECTS and SCENES are data sets as `l2r2 composite` takes them. The composites have its default correlations (0.97 and 0.87),
true masks and boxes. Each row is a network of its own that sees one kind of view (branches full, or fg), from scratch, through
the same finetune that users call; weights after the last epoch, nothing is chosen on any split. The published finding (Aniraj et
al., ICCVW 2023) is that early masking beats late masking out of distribution. Interrupted, the same command continues. Writes
benchmarks/results/masking.csv.

iFAM is trained on the same images without boxes and masks. Its IoU is that of the patches it keeps with those that the true
mask covers by half, over the images of a split; `everything` is the IoU of keeping all patches. An IoU near that can mean
that it keeps all or few: `object_kept` and `background_kept` are the shares of the patches under the mask, and of the others,
that it keeps. All in %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from background_shift import COMMON, about_run, write_table
from torch import Tensor

from l2r2_models import make_views
from l2r2_models.data.dataset import sample_of
from l2r2_models.data.spawrious import composites
from l2r2_models.data.table import ImageTable, read_table
from l2r2_models.evaluate.logits import branch_logits
from l2r2_models.hub import Checkpoint, load_checkpoint
from l2r2_models.ifam import IFAM
from l2r2_models.masking import coverage
from l2r2_models.train.finetune import finetune
from l2r2_models.train.recipes import Recipe

SPLITS = ("test_id", "test_ood")
SMALL_VIT = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
SMALL_CONVNEXT = {"patch_size": 2, "depths": [1, 1, 3, 1], "dims": [32, 64, 128, 256]}  # at 64 pixels its last map is 4 x 4
BACKBONES = {
    "convnext": {"model": "l2r2_convnext_tiny", "backbone": SMALL_CONVNEXT},
    "vit": {"model": "l2r2_vit_tiny_patch16_224", "backbone": SMALL_VIT},
}
KINDS = {
    "full": {"branches": ("full",)},
    "crop": {"branches": ("fg",), "fg": "crop"},
    "masked_crop": {"branches": ("fg",), "fg": "masked_crop"},
    "masked (early)": {"branches": ("fg",), "fg": "masked"},
    "late, last stage": {"branches": ("fg",), "fg": "late"},
    "late, one before": {"branches": ("fg",), "fg": "late", "late_stage": "before_last"},
    "tokens": {"branches": ("fg",), "fg": "tokens"},
}
IFAM_RECIPE = {"model": "ifam_vit_tiny_patch16_224", "backbone": SMALL_VIT, "num_parts": 4}
KEPT = ("iou", "iou_of_everything", "object_kept", "background_kept")
RESULTS = Path(__file__).parent.parent / "results" / "masking.csv"


def plan(only: list[str] | None) -> dict[str, dict]:
    """Name -> recipe keys of every network."""
    networks = {
        f"{backbone}:{kind}": {**of_backbone, **of_kind}
        for backbone, of_backbone in BACKBONES.items()
        for kind, of_kind in KINDS.items()
        if backbone == "vit" or kind != "tokens"
    }
    networks["vit:ifam"] = IFAM_RECIPE
    return {name: keys for name, keys in networks.items() if not only or name in only}


def measure(data: Path, work: Path, name: str, keys: dict, seed: int, size: int, epochs: int) -> list[dict]:
    run = work / f"{name.replace(':', '_').replace(', ', '_').replace(' ', '_')}_s{seed}"
    print(f"{name}, seed {seed}", flush=True)
    settings = {**COMMON, "batch_size": 32, **keys, "pretrained": False, "size": size, "epochs": epochs, "seed": seed}
    finetune(data, Recipe.read("scratch", settings), run)
    checkpoint = load_checkpoint(run)
    splits = {split: read_table(data).of_split(split) for split in SPLITS}
    found = {split: branch_logits(checkpoint, table, run / "logits") for split, table in splits.items()}
    parts = {split: kept_figures(checkpoint, table) for split, table in splits.items()} if name == "vit:ifam" else {}
    rows = []
    for branch in found[SPLITS[0]].logits:
        row: dict = {"network": name, "answer": branch, "seed": seed}
        for split, said in found.items():
            answers = said.logits[branch]
            if "full" in said.logits:  # where iFAM keeps nothing, its first stage answers
                answers = torch.where(said.has_fg[:, None], answers, said.logits["full"])
            row[split] = round(100 * (answers.argmax(1) == said.labels).float().mean().item(), 1)
            kept = parts.get(split, {}) if branch == "fg" else {}
            row |= {f"{split}_{figure}": kept.get(figure) for figure in KEPT}
        rows.append(row)
    return rows


@torch.inference_mode()
def kept_figures(checkpoint: Checkpoint, table: ImageTable) -> dict[str, float]:
    """What iFAM keeps of the images of a table with true masks, by the names of `KEPT`: means over images, in %."""
    model, spec = checkpoint.model, checkpoint.model.view_spec
    assert isinstance(model, IFAM)
    figures: list[Tensor] = []
    for row in table.rows:
        sample = sample_of(row, spec.fill)
        assert sample.mask is not None
        views = make_views([sample.pixels], sample.box[None], spec, branches=model.branches)
        keep = model.find_parts(views.full).keep[0]  # type: ignore[arg-type]
        true = coverage(sample.mask[None].float(), tuple(keep.shape))[0] >= 0.5  # type: ignore[arg-type]
        figures.append(kept_of(keep, true))
    means = (100 * torch.stack(figures).nanmean(0)).tolist()
    return {figure: round(mean, 1) for figure, mean in zip(KEPT, means)}


def kept_of(keep: Tensor, true: Tensor) -> Tensor:
    """The figures `KEPT` of one image, 0 to 1, of bool `[h, w]` kept and true patches; NaN for a share of no patches."""
    either = (keep | true).sum().clamp(min=1)
    return torch.stack([(keep & true).sum() / either, true.float().mean(), keep[true].float().mean(), keep[~true].float().mean()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", type=Path)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(plan(None)))
    parser.add_argument("--work", type=Path, default=Path("runs/masking"))
    arguments = parser.parse_args()
    data = composites(arguments.objects, arguments.scenes, arguments.work / "data")
    rows = len(read_table(data).of_split("train"))
    about = about_run(pixels=arguments.size, epochs=arguments.epochs, training_rows=rows)
    table: list[dict] = []
    for seed in arguments.seeds:
        for name, keys in plan(arguments.only).items():
            table += measure(data, arguments.work, name, keys, seed, arguments.size, arguments.epochs)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            write_table(table, RESULTS, about)
            row = table[-1]
            print("   ".join(f"{split} {row[split]:5.1f}" for split in SPLITS), flush=True)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()

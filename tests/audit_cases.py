"""Data whose object and background both predict the class, and two real models that use only one of them."""

import csv
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, save_for_hf
from torch import nn

OBJECTS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}
GROUNDS = {"red": (60, 200, 200), "green": (200, 60, 200), "blue": (200, 200, 60)}
SIDE = 32


def write_data(folder: Path, count: int = 24, seed: int = 0, masks: bool = False, side: int = SIDE) -> Path:
    """Squares in the middle of plain grounds; each class has its color of both. With masks the object is a disc."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    low, high = side // 4, 3 * side // 4
    y, x = np.mgrid[:side, :side] + 0.5
    disc = (y - side / 2) ** 2 + (x - side / 2) ** 2 < ((high - low) / 2) ** 2
    rows = []
    for i in range(count):
        label = list(OBJECTS)[i % 3]
        pixels = np.empty((side, side, 3), np.int64)
        pixels[:] = GROUNDS[label]
        square = np.zeros((side, side), bool)
        square[low:high, low:high] = True
        pixels[disc if masks else square] = OBJECTS[label]
        pixels += rng.integers(-10, 11, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i:03d}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"masks/{i:03d}.png")
        mask = f"masks/{i:03d}.png" if masks else ""
        rows.append((f"images/{i:03d}.png", label, "test", low, low, high, high, mask, "ab"[i % 2]))
    with open(folder / "metadata.csv", "w", newline="") as file:
        head = ("file_name", "label", "split", "x0", "y0", "x1", "y1", "mask_file", "site")
        csv.writer(file).writerows([head, *rows])
    return folder


class Patch(nn.Module):
    """The color in the middle, or in the corner, of an image; a linear layer on it."""

    def __init__(self, middle: bool = False, num_classes: int = 3, in_chans: int = 3, **_) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 3
        self.middle = middle
        self.fc = nn.Linear(in_chans, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = x.shape[-1] // 2 if self.middle else 1
        return self.fc(x[..., at : at + 2, at : at + 2].mean((2, 3)))


_cfg = dict(input_size=(3, SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=3, classifier="fc", interpolation="bilinear")
default_cfgs = generate_default_cfgs({"audit_middle.cases": _cfg, "audit_corner.cases": _cfg})


@register_model
def audit_middle(pretrained=False, **kwargs):
    return build_model_with_cfg(Patch, "audit_middle", pretrained, middle=True, **kwargs)


@register_model
def audit_corner(pretrained=False, **kwargs):
    return build_model_with_cfg(Patch, "audit_corner", pretrained, **kwargs)


def write_model(folder: Path, where: str, labels: dict | list | None = None) -> Path:
    """`middle` or `corner`, fitted to the colors by nearest mean, as a checkpoint in timm's layout."""
    model = timm.create_model(f"audit_{where}")
    colors = torch.tensor(list((OBJECTS if where == "middle" else GROUNDS).values())) / 127.5 - 1
    with torch.no_grad():
        model.fc.weight.copy_(20 * colors)
        model.fc.bias.copy_(-10 * colors.square().sum(1))
    folder.mkdir(parents=True)
    save_for_hf(model, str(folder), {"label_names": labels or list(OBJECTS)}, safe_serialization=True)
    return folder

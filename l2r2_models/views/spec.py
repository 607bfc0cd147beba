"""The settings for cutting views, `ViewSpec`, which are stored in the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import config
from ..errors import L2R2Error
from .branches import BRANCHES
from .modes import FG_MODES, FgMode

CHOICES = {
    "fg_mode": tuple(FG_MODES),
    "bg": ("shape", "box"),
    "interpolation": ("bilinear", "bicubic"),
    "mode": ("float", "pil"),
    "decode": ("full", "scaled"),
    "late_stage": ("last", "before_last"),
    "late_pool": ("mask", "all", "token"),
}
MOST_SIZE = 4096


@dataclass(frozen=True)
class ViewSpec:
    """How views are cut; training, prediction, evaluation and export all use the spec stored in the checkpoint.

    The order is mask, crop to the box, pad to a centered square with `fill`, resize, normalize (`docs/method.md`, Views; L2R2,
    appendix B.2).

    Attributes:
        size: side of the square views in pixels.
        sizes: other sides, by branch, e.g. `{"full": 128}`: a small full view makes a model faster. Not for an fg that is masked
            inside the network, because it sees the full view.
        fg_mode: `crop` (cut to the box), `masked_crop` (background replaced by `fill`, then cut) or `masked` (background
            replaced, not cut); or masked inside the network, which sees the whole image: `late` (features outside the object are
            zeroed), `tokens` (patches outside are dropped from a ViT) or `parts` (the network finds the object itself, see
            `IFAM`). Without a mask, the box is the mask.
        bg: `shape` (object pixels replaced; the same as `box` without a mask) or `box` (the object's box replaced, grown to
            contain the mask if there is one).
        margin: how far the fg box is grown at each end, relative to its side.
        square: whether to pad to a square before the resize, for the full view too; False stretches.
        patch: 0, or the patch size of a NaFlexViT, whose views keep the aspect ratio of the image or the box: whole patches, at
            most as many as a square of side `size` has (`native_size`). `square` is then False.
        fill: RGB levels (0-255) of padding and of replaced pixels.
        interpolation: `bilinear` or `bicubic`, antialiased.
        mode: `float`, or `pil`, which rounds exactly as Pillow does (square views only).
        decode: `full`, or `scaled` to reduce image files by 2, 4 or 8 before cutting, while at least twice `size` pixels remain,
            JPEG files while decoding (`docs/method.md`, Views). Mode `pil` needs `full`.
        mean: mean per channel of pixels in [0, 1], for normalization.
        std: standard deviation per channel of pixels in [0, 1], for normalization.
        late_stage: whether `late` masks the output of the `last` stage, or of the one `before_last`; the last then runs twice.
        late_pool: whether `late` pools by the masked mean (`mask`), over all positions with zeros outside (`all`), or by a ViT's
            class token (`token`, needs `before_last`).
        coverage: minimum fraction of a patch that the object must cover for `tokens` to keep the patch.

    Raises:
        L2R2Error: when a value is out of range or not one of the choices.

    >>> ViewSpec(size=96, fg_mode="masked_crop").fg.crops
    True
    """

    size: int = 224
    sizes: dict[str, int] = field(default_factory=dict, hash=False)
    fg_mode: Literal["crop", "masked_crop", "masked", "late", "tokens", "parts"] = "crop"
    bg: Literal["shape", "box"] = "shape"
    margin: float = 0.0
    square: bool = True
    patch: int = 0
    fill: tuple[int, int, int] = (124, 116, 104)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mode: Literal["float", "pil"] = "float"
    decode: Literal["full", "scaled"] = "full"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    late_stage: Literal["last", "before_last"] = "last"
    late_pool: Literal["mask", "all", "token"] = "mask"
    coverage: float = 0.25

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise L2R2Error(f'Unknown {name} "{getattr(self, name)}" of a view; choose from {", ".join(choices)}.')
        self._check_sizes()
        self._check_patch()
        if not _is_number(self.margin) or not 0 <= self.margin <= 10:
            raise L2R2Error(f"A view's margin must be between 0 and 10 box sides, got {self.margin!r}.")
        if not _is_number(self.coverage) or not 0 <= self.coverage <= 1:
            raise L2R2Error(f"A view's coverage must be between 0 and 1, got {self.coverage!r}.")
        if not isinstance(self.square, bool):
            raise L2R2Error(f"A view's square must be true or false, got {self.square!r}.")
        for name in ("fill", "mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) != 3 or not all(map(_is_number, values)):
                raise L2R2Error(f"A view's {name} must be three numbers, got {values!r}.")
            object.__setattr__(self, name, tuple(values))
        if not all(v == int(v) and 0 <= v <= 255 for v in self.fill):
            raise L2R2Error(f"A view's fill must be whole levels from 0 to 255, got {self.fill}.")
        if not all(v > 0 for v in self.std):
            raise L2R2Error(f"A view's std must be above 0, got {self.std}.")
        if self.mode == "pil" and not self.square:
            raise L2R2Error('Views of mode "pil" must be square.')
        if self.mode == "pil" and self.decode != "full":
            raise L2R2Error('Views of mode "pil" need decode "full", to match Pillow exactly.')

    def _check_sizes(self) -> None:
        for branch, size in {"": self.size, **self.sizes}.items():
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST_SIZE:
                what = f"A view's size for {branch}" if branch else "A view's size"
                raise L2R2Error(f"{what} must be between 1 and {MOST_SIZE} pixels, got {size!r}.")
        if unknown := [branch for branch in self.sizes if branch not in BRANCHES]:
            raise L2R2Error(f'Unknown branch "{unknown[0]}" in the sizes of views; choose from {", ".join(BRANCHES)}.')
        if self.fg.in_network and self.size_of("full") != self.size_of("fg"):
            raise L2R2Error(f'With fg_mode "{self.fg_mode}", fg sees the full view, so their sizes must be equal.')
        object.__setattr__(self, "sizes", dict(self.sizes))

    def _check_patch(self) -> None:
        if not isinstance(self.patch, int) or isinstance(self.patch, bool) or not 0 <= self.patch <= MOST_SIZE:
            raise L2R2Error(f"A view's patch must be 0 or the side of a patch in pixels, got {self.patch!r}.")
        if not self.patch:
            return
        object.__setattr__(self, "square", False)
        if wrong := [size for size in (self.size, *self.sizes.values()) if size % self.patch]:
            near = max(1, round(wrong[0] / self.patch)) * self.patch
            raise L2R2Error(f"A view's size must be a multiple of its patch of {self.patch} pixels, e.g. {near}; got {wrong[0]}.")
        if self.fg.in_network:
            raise L2R2Error(
                f'fg_mode "{self.fg_mode}" needs square views; set patch to 0, or choose crop, masked_crop or masked.'
            )

    def size_of(self, branch: str) -> int:
        """Side of a branch's view in pixels; with `patch`, that of a square of as many patches as a view has at most.

        >>> spec = ViewSpec(sizes={"full": 128})
        >>> spec.size_of("full"), spec.size_of("fg")
        (128, 224)
        """
        return self.sizes.get(branch, self.size)

    def size_words(self, branches: Sequence[str]) -> str:
        """The sizes of the views of these branches, in words.

        >>> ViewSpec(sizes={"full": 128}).size_words(["full", "fg"])
        '128 x 128 (full) and 224 x 224 (fg) pixels'
        """
        sides = {branch: f"{self.size_of(branch)} x {self.size_of(branch)}" for branch in branches}
        if self.patch:
            sides = {b: f"up to {(self.size_of(b) // self.patch) ** 2} patches of {self.patch} x {self.patch}" for b in branches}
        if len(set(sides.values())) == 1:
            return f"{sides[branches[0]]} pixels"
        return " and ".join(f"{side} ({branch})" for branch, side in sides.items()) + " pixels"

    @property
    def fg(self) -> FgMode:
        """Entry of `fg_mode` in the table of modes."""
        return FG_MODES[self.fg_mode]

    @property
    def crop_mode(self) -> str:
        """The full view's crop mode in timm's terms: padded to a square or stretched (timm's default crops the sides)."""
        return "border" if self.square else "squash"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ViewSpec:
        """Build a spec from a checkpoint's config.

        Raises:
            L2R2Error: when a field is unknown or its value is invalid.

        >>> ViewSpec.from_dict({"size": 96}).size
        96
        """
        return config.from_dict(cls, data, "view field")

    @classmethod
    def from_pretrained_cfg(cls, cfg: Mapping[str, Any], **changes: Any) -> ViewSpec:
        """Build the spec of a new model on a timm model: its input size, interpolation, mean and std; `fill` is the mean color.

        Args:
            cfg: the model's `pretrained_cfg`.
            **changes: fields that replace those of the cfg.

        Raises:
            L2R2Error: when a value is invalid.

        >>> ViewSpec.from_pretrained_cfg({"input_size": (3, 288, 288), "mean": (0.5, 0.5, 0.5)}).fill
        (128, 128, 128)
        """
        mean = tuple(cfg.get("mean", cls.mean))
        std = tuple(cfg.get("std", cls.std))
        interpolation = cfg.get("interpolation", "bicubic")
        values: dict[str, Any] = {
            "size": cfg.get("input_size", (3, 224, 224))[-1],
            "interpolation": interpolation if interpolation in CHOICES["interpolation"] else "bicubic",
            "mean": mean,
            "std": std,
            "fill": tuple(round(255 * m) for m in mean),
            "decode": "full" if changes.get("mode") == "pil" else "scaled",
        }
        return cls(**{**values, **changes})

    def to_uint8(self, views: Tensor) -> Tensor:
        """Turn normalized views `[..., 3, H, W]` back into uint8 pixels of the same shape, to look at them.

        >>> ViewSpec(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).to_uint8(torch.ones(3, 1, 1)).flatten()
        tensor([255, 255, 255], dtype=torch.uint8)
        """
        mean, std = (torch.tensor(v, device=views.device).view(3, 1, 1) for v in (self.mean, self.std))
        return ((views * std + mean).clamp(0, 1) * 255).round().byte()

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON or YAML."""
        return config.to_dict(self)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

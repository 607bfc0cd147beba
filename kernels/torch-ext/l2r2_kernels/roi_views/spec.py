"""The settings of one `roi_views` call, checked once and passed on as plain numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

INTERPOLATIONS = ("bilinear", "bicubic")
MODES = ("float", "pil")
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Spec(NamedTuple):
    """One view spec. Pixel quantities (fill) are in the units of the input; mean and std in units of input / scale."""

    height: int
    width: int
    margin: float
    square: bool
    fill: tuple[float, ...]
    interpolation: str
    antialias: bool
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    dtype: torch.dtype
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the views."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def affine(self) -> tuple[list[float], list[float]]:
        """Per channel (a, b) with normalized(x) = a * (x - fill) + b."""
        a = [1.0 / (self.scale * s) for s in self.std]
        b = [(f / self.scale - m) / s for f, m, s in zip(self.fill, self.mean, self.std)]
        return a, b


def _three(name: str, value: float | Sequence[float] | torch.Tensor | None, default: float) -> tuple[float, ...]:
    if value is None:
        return (default,) * 3
    try:
        flat = value.tolist() if hasattr(value, "tolist") else value  # tensors, arrays and their scalars
        values = tuple(map(float, flat)) if isinstance(flat, Sequence) else (float(flat),) * 3
    except (TypeError, ValueError):
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise ValueError(f"roi_views: {name} must be one finite number or three (R, G, B), got {value!r}")
    return values


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    try:
        pair = tuple(map(operator.index, size if isinstance(size, Sequence) else (size, size)))
    except TypeError:
        pair = ()
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"roi_views: size must be a positive int or (height, width), got {size!r}")
    return pair[0], pair[1]


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def make_spec(
    *,
    is_uint8: bool,
    size: int | Sequence[int],
    margin: float,
    square: bool,
    fill: float | Sequence[float],
    interpolation: str,
    antialias: bool,
    mode: str,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    scale: float | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Spec:
    """Check the settings and fill in the defaults; every error names the argument."""
    height, width = _pair(size)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f'roi_views: interpolation must be one of {", ".join(INTERPOLATIONS)}, got "{interpolation}"')
    if mode not in MODES:
        raise ValueError(f'roi_views: mode must be one of {", ".join(MODES)}, got "{mode}"')
    if dtype not in OUT_DTYPES:
        raise TypeError(f"roi_views: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"roi_views: memory_format must be contiguous_format or channels_last, got {memory_format}")
    if not (_finite(margin) and margin >= 0):
        raise ValueError(f"roi_views: margin must be a finite number >= 0, got {margin!r}")
    if scale is None:
        scale = 255.0 if is_uint8 else 1.0
    if not (_finite(scale) and scale > 0):
        raise ValueError(f"roi_views: scale must be a finite number > 0, got {scale!r}")
    spec = Spec(
        height, width, float(margin), bool(square), _three("fill", fill, 0.0), interpolation, bool(antialias), mode,
        _three("mean", mean, 0.0), _three("std", std, 1.0), float(scale), dtype, memory_format == torch.channels_last,
    )  # fmt: skip
    if min(spec.std) <= 0:
        raise ValueError(f"roi_views: std must be > 0, got {std!r}")
    if mode == "pil":
        _check_pil(spec, is_uint8)
    return spec


def _check_pil(spec: Spec, is_uint8: bool) -> None:
    if not is_uint8:
        raise TypeError('roi_views: mode "pil" rounds to uint8 and so needs uint8 images; use mode "float" for float images')
    if not spec.square or spec.height != spec.width:
        raise ValueError('roi_views: mode "pil" promises Pillow\'s result for square canvases only: square=True and one size')
    if not spec.antialias:
        raise ValueError('roi_views: mode "pil" needs antialias=True, as Pillow always antialiases')
    if not all(f == int(f) and 0 <= f <= 255 for f in spec.fill):
        raise ValueError(f'roi_views: fill must be three whole numbers from 0 to 255 in mode "pil", got {spec.fill!r}')

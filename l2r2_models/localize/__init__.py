"""Localizers behind one protocol: prompted detectors, segmenters, the backbone itself, a trained box head, and controls."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import L2R2Error
from .base import Context, Localizer, LocalizerSpec
from .presets import NONE, PRESETS, expand, license_of

if TYPE_CHECKING:
    import torch

    from ..checkpoints.checkpoint import Checkpoint

__all__ = ["LOCALIZERS", "NONE", "PRESETS", "Localizer", "LocalizerSpec", "create_localizer"]

# name -> module and class; imported on use, because most need a heavy library
LOCALIZERS = {
    "owlv2": ("prompted", "Owlv2"),
    "grounding-dino": ("prompted", "GroundingDino"),
    "omdet-turbo": ("prompted", "OmDetTurbo"),
    "florence2": ("florence", "Florence2"),
    "sam3": ("sam3", "Sam3"),
    "detr": ("detector", "Detector"),
    "boxes": ("controls", "Boxes"),
    "head": ("model_based", "Head"),
    "mask-head": ("model_based", "SegmentationHead"),
    "ncut": ("unsupervised", "NormalizedCut"),
    "attn": ("unsupervised", "Attention"),
    "outlier": ("outlier", "Outlier"),
    "cam": ("unsupervised", "ActivationMap"),
    "parts": ("model_based", "Parts"),
    "center": ("controls", "Center"),
    "full": ("controls", "Full"),
}
DEFAULT = "prompt"


def create_localizer(
    spec: str | LocalizerSpec, *, device: str | torch.device | None = None, checkpoint: Checkpoint | None = None
) -> Localizer:
    """Create a localizer from its spec.

    Args:
        spec: a `LocalizerSpec` or its text (see `localize.base`), e.g.
            `owlv2:google/owlv2-base-patch16-ensemble?prompt=mushroom`, or that of a preset, e.g. `camera-trap`. The option
            `masks=sam:...` (or `sam2`, `edgetam`) adds masks to the boxes of any localizer.
        device: defaults to CUDA if available, one GPU per process under torchrun.
        checkpoint: the model that `head`, `mask-head`, `ncut`, `attn`, `cam` and `parts` use if the spec has no source.

    Returns:
        The localizer; call it with a list of images.

    Raises:
        L2R2Error: when the name, an option, a value or the device is invalid, or a network cannot be loaded.

    >>> from PIL import Image
    >>> create_localizer("center?share=0.5", device="cpu")([Image.new("RGB", (80, 40))])[0].boxes.tolist()
    [[20.0, 10.0, 60.0, 30.0]]
    """
    import torch

    spec = expand(LocalizerSpec.parse(spec) if isinstance(spec, str) else spec)
    if spec.name == NONE:
        raise L2R2Error(f"The localizer {NONE} finds no boxes; name another one, or leave the boxes out of the next command.")
    if spec.name not in LOCALIZERS:
        near = f' If that is a file, write "boxes:{spec}".' if Path(str(spec)).exists() else ""
        raise L2R2Error(f'Unknown localizer "{spec.name}"; choose from {", ".join((*PRESETS, *LOCALIZERS))}.{near}')
    if device is None:
        number = int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())
        device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise L2R2Error(f'The device "{device}" cannot be used ({str(error).splitlines()[0][:200]}).') from error
    context = Context(torch.device(device), checkpoint)
    masks = spec.options.get("masks", ())
    if "masks" in spec.options and len(masks) != 1:
        raise L2R2Error(f'The localizer "{spec}" has {len(masks)} values for masks; give one.')
    module, name = LOCALIZERS[spec.name]
    bare = replace(spec, options={k: v for k, v in spec.options.items() if k != "masks"})
    localizer: Localizer = getattr(import_module(f".{module}", __name__), name)(bare, context)
    localizer.license = license_of(spec)
    if masks:
        from .segment import Masked

        localizer = Masked(localizer, masks[0], context)
    return localizer

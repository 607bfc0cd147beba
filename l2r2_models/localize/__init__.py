"""Ways to a box, behind one protocol: prompted detectors, segmenters, the backbone itself, a trained head, and controls."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import L2R2Error
from .base import Context, Localizer, LocalizerSpec

if TYPE_CHECKING:
    import torch

    from ..checkpoints.checkpoint import Checkpoint

__all__ = ["LOCALIZERS", "Localizer", "LocalizerSpec", "create_localizer"]

# name -> module and class; imported when it is asked for, because most need a heavy library
LOCALIZERS = {
    "owlv2": ("prompted", "Owlv2"),
    "grounding-dino": ("prompted", "GroundingDino"),
    "boxes": ("controls", "Boxes"),
    "head": ("model_based", "Head"),
    "ncut": ("unsupervised", "NormalizedCut"),
    "cam": ("unsupervised", "ActivationMap"),
    "parts": ("model_based", "Parts"),
    "center": ("controls", "Center"),
    "full": ("controls", "Full"),
}
DEFAULT = "owlv2:google/owlv2-base-patch16-ensemble"


def create_localizer(
    spec: str | LocalizerSpec, *, device: str | torch.device | None = None, checkpoint: Checkpoint | None = None
) -> Localizer:
    """A localizer from its spec (see `localize.base`).

    Args:
        spec: e.g. `owlv2:google/owlv2-base-patch16-ensemble?prompt=mushroom`; the option `masks=sam:...` or `masks=sam2:...`
            adds masks to any kind.
        device: default cuda where there is one; under torchrun each process has its own.
        checkpoint: for `head`, `ncut`, `cam` and `parts` without a source: the model to look with.

    Raises:
        L2R2Error: an unknown kind, option, value or device, or a network that is not there; the message says what to do.
    """
    import torch

    spec = LocalizerSpec.parse(spec) if isinstance(spec, str) else spec
    if spec.name not in LOCALIZERS:
        near = f' If that is a file, write "boxes:{spec}".' if Path(str(spec)).exists() else ""
        raise L2R2Error(f'Unknown localizer "{spec.name}"; choose from {", ".join(LOCALIZERS)}.{near}')
    if device is None:
        number = int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count())
        device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise L2R2Error(f'The device "{device}" cannot be used ({str(error).splitlines()[0][:200]}).') from error
    context = Context(torch.device(device), checkpoint)
    masks = spec.options.get("masks", ())
    if "masks" in spec.options and len(masks) != 1:
        raise L2R2Error(f'The localizer "{spec}" has {len(masks)} values of masks; give one.')
    module, name = LOCALIZERS[spec.name]
    bare = replace(spec, options={k: v for k, v in spec.options.items() if k != "masks"})
    localizer: Localizer = getattr(import_module(f".{module}", __name__), name)(bare, context)
    if masks:
        from .segment import Masked

        localizer = Masked(localizer, masks[0], context)
    return localizer

"""Views, the crops and masked images that the branches see. Only `make_views` cuts them."""

from .cut import Views, batch_masks, cut_batch, make_views, view_map
from .modes import FG_MODES, FgMode
from .patches import Patches, decode_patches, takes_patches
from .spec import ViewSpec

__all__ = [
    "FG_MODES",
    "FgMode",
    "Patches",
    "ViewSpec",
    "Views",
    "batch_masks",
    "cut_batch",
    "decode_patches",
    "make_views",
    "takes_patches",
    "view_map",
]

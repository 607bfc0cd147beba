"""Views, the crops and masked images that the branches see. Only `make_views` cuts them."""

from .batch import batch_masks, batch_views, cut_batch
from .branches import BRANCHES, check_branches
from .cut import Views, make_views, mask_in_full_view, view_map
from .modes import FG_MODES, FgMode
from .native import cat_views, native_size, pad_alike, stack_views
from .patches import Patches, decode_patches, scale_of, takes_patches
from .spec import ViewSpec

__all__ = [
    "BRANCHES",
    "FG_MODES",
    "FgMode",
    "Patches",
    "ViewSpec",
    "Views",
    "batch_masks",
    "batch_views",
    "cat_views",
    "check_branches",
    "cut_batch",
    "decode_patches",
    "make_views",
    "mask_in_full_view",
    "native_size",
    "pad_alike",
    "scale_of",
    "stack_views",
    "takes_patches",
    "view_map",
]

"""What timm's backbones are called, and what they tell about themselves."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm


def unknown_backbone(name: str) -> str:
    """The sentence for a timm backbone that does not exist, with close names."""
    stem = name.split(".")[0]
    close = get_close_matches(stem, timm.list_models(), 5)
    return f'Unknown timm backbone "{stem}"' + (f"; close names: {', '.join(close)}." if close else ".")


def feature_info(backbone: Any) -> list[dict[str, Any]]:
    """Module, channels and reduction of each stage, whichever way the backbone keeps them."""
    info = backbone.feature_info
    return list(info.info if hasattr(info, "info") else info)

"""Views of images in one pass: box margin and clip, crop, mask, pad to a square, resize, normalise, cast."""

from .op import roi_views

__all__ = ["roi_views"]

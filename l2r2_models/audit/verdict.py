"""One sentence about an audit, in plain words and no surer than its figures."""

from __future__ import annotations

from collections.abc import Mapping

from .metrics import Estimate

LEANS, DECIDES = 0.05, 0.20  # parts of all images that are lost on changed backgrounds
FEW = 20  # images; with fewer nothing is said


def verdict_of(who: str, figures: Mapping[str, Estimate], images: int, classes: int) -> str:
    """The verdict on one answer of a model.

    It goes by `swap_loss`, the accuracy lost when the object lies on the background of another image of a random class, and by
    the whole of its 95 % interval: all of it above 20 points, the background decides; all above 5, the model leans on it; all
    below 5, it does not; else the images are too few to tell. `bg_gap` says how much of the loss hangs on the class of the
    background; what is lost on backgrounds of the object's own class too is lost to any change, pasting included.

    Args:
        who: the subject of the sentence, e.g. "this model".
        figures: see `robustness.measures`.
        images, classes: how many were judged.
    """
    accuracy, loss = figures["accuracy"], figures.get("swap_loss")
    if images < FEW:
        return f"Only {images} images have an object and a background: too few to say what {who} looks at ({FEW} are needed)."
    if loss is None:
        return f"No background of another class could be given to these images, so nothing can be said of what {who} looks at."
    if accuracy.low <= 1 / classes:
        chance = f"no better than guessing among {classes} classes"
        right = f"{100 * accuracy.value:.0f} % ({100 * accuracy.low:.0f} to {100 * accuracy.high:.0f})"
        return f"On these images {who} is right in {right}, {chance}, so nothing can be said of what it looks at."
    lost = f"On swapped backgrounds {who} loses {_points(loss)} of its {100 * accuracy.value:.0f} % accuracy"
    if loss.low > DECIDES:
        return f"{lost}{_cause(figures)}: the background decides many of its answers."
    if loss.low > LEANS:
        return f"{lost}{_cause(figures)}: it leans on the background."
    if loss.high < LEANS:
        return f"{lost if loss.value > 0 else f'On swapped backgrounds {who} loses nothing'}: the object decides."
    return f"{lost}: {images} images are too few to tell whether that is more than {100 * LEANS:.0f} points."


def _cause(figures: Mapping[str, Estimate]) -> str:
    gap = figures.get("bg_gap")
    if gap is None:
        return ""
    if gap.low > 0:
        return f", and {_points(gap)} hang on the class of the background alone"
    if gap.high < LEANS:
        return ", but backgrounds of the object's own class hurt it as much, so any change does, pasting included"
    return ""


def _points(f: Estimate) -> str:
    value, low, high = (round(100 * v) for v in (f.value, f.low, f.high))
    return f"{value} point{'' if value == 1 else 's'} ({low} to {high})"

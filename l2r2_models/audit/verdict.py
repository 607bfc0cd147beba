"""Summarize an audit in one sentence that its confidence intervals support."""

from __future__ import annotations

from collections.abc import Mapping

from .metrics import Estimate

LEANS, DECIDES = 0.05, 0.20  # loss of accuracy on swapped backgrounds
FEW = 20  # images; with fewer, there is no verdict


def verdict_of(who: str, estimates: Mapping[str, Estimate], images: int, classes: int) -> str:
    """Write the verdict on one output of a model.

    It depends on the 95 % interval of `swap_loss`, the accuracy lost on the backgrounds of images of random classes. If the
    whole interval is above 20 points, the background decides; above 5, the model relies on it; below 5, it does not; otherwise
    there are too few images to tell. `bg_gap` is the part of the loss that is due to the class of the background; the rest is
    also lost on backgrounds of the object's own class, so it is due to the change itself, including the pasting.

    Args:
        who: the subject of the sentence, e.g. "this model".
        estimates: estimates by name, see `audit.metrics.measures`.
        images, classes: number of audited images, and of their classes.

    >>> found = {"accuracy": Estimate(0.9, 0.88, 0.92), "swap_loss": Estimate(0.02, 0.0, 0.04)}
    >>> verdict_of("this model", found, images=400, classes=10)
    'On swapped backgrounds this model loses 2 points (0 to 4) of its 90 % accuracy: the object decides.'
    """
    accuracy, loss = estimates["accuracy"], estimates.get("swap_loss")
    if images < FEW:
        return f"Only {images} images have an object and a background; at least {FEW} are needed to tell what {who} relies on."
    if loss is None:
        return f"No background of another class is available, so it is not possible to tell what {who} relies on."
    if accuracy.low <= 1 / classes:
        reached = f"{100 * accuracy.value:.0f} % ({100 * accuracy.low:.0f} to {100 * accuracy.high:.0f})"
        return (
            f"On these images {who} has an accuracy of {reached}, no better than guessing among {classes} classes, so it is not "
            "possible to tell what it relies on."
        )
    lost = f"On swapped backgrounds {who} loses {_points(loss)} of its {100 * accuracy.value:.0f} % accuracy"
    if loss.low > DECIDES:
        return f"{lost}{_cause(estimates)}: the background decides many of its predictions."
    if loss.low > LEANS:
        return f"{lost}{_cause(estimates)}: it relies on the background."
    if loss.high < LEANS:
        return f"{lost if loss.value > 0 else f'On swapped backgrounds {who} loses nothing'}: the object decides."
    if loss.value < 0:
        low, high = round(100 * loss.low), round(100 * loss.high)
        lost = f"On swapped backgrounds {who} loses nothing of its {100 * accuracy.value:.0f} % accuracy ({low} to {high} points)"
    return f"{lost}: {images} images are too few to tell whether that is more than {100 * LEANS:.0f} points."


def advice_of(estimates: Mapping[str, Estimate], fg_mode: str, masks: bool) -> str | None:
    """Return what to do about an fg branch that relies on the background inside its box, or None.

    Args:
        estimates: estimates of the fg branch by name.
        fg_mode: what fg sees, see `ViewSpec`.
        masks: whether the audited objects have masks.

    >>> advice_of({"swap_loss": Estimate(0.2, 0.1, 0.3)}, "crop", masks=True)
    'the fg branch relies on the background inside its box; the data has masks, so try to train with --fg-mode masked_crop.'
    """
    loss = estimates.get("swap_loss")
    if loss is None or loss.low <= LEANS or fg_mode != "crop" or not masks:
        return None
    return (
        "the fg branch relies on the background inside its box; the data has masks, so try to train with --fg-mode masked_crop."
    )


def _cause(estimates: Mapping[str, Estimate]) -> str:
    gap = estimates.get("bg_gap")
    if gap is None:
        return ""
    if gap.low > 0:
        return f", and {_points(gap)} are due to the class of the background alone"
    if gap.high < LEANS:
        return ", but just as many on backgrounds of the object's own class, so any change has this effect, including the pasting"
    return ""


def _points(f: Estimate) -> str:
    value, low, high = (round(100 * v) for v in (f.value, f.low, f.high))
    return f"{value} point{'' if value == 1 else 's'} ({low} to {high})"

"""The table of fg modes: what the fg branch sees, and the properties that other modules use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FgMode:
    """One way to show the object to the fg branch (`docs/method.md`, Views).

    Attributes:
        name: the mode's name in a `ViewSpec`, a recipe and on the command line.
        words: what the branch sees, for a model card.
        crops: whether the view is cut to the object's box.
        erases: whether the background is replaced by the fill color before the view is cut.
        in_network: whether the branch sees the whole image, masked inside the network, so that its view is that of `full`.
        takes_mask: whether the network needs the object's mask.
        finds_object: whether the network finds the object itself, without boxes or masks.
        drops_tokens: whether masked patches never enter the blocks of a ViT.

    >>> [name for name, mode in FG_MODES.items() if mode.takes_mask]
    ['late', 'tokens']
    """

    name: str
    words: str = "the object, cut out of it"
    crops: bool = False
    erases: bool = False
    in_network: bool = False
    takes_mask: bool = False
    finds_object: bool = False
    drops_tokens: bool = False


FG_MODES: dict[str, FgMode] = {
    mode.name: mode
    for mode in (
        FgMode("crop", crops=True),
        FgMode("masked_crop", crops=True, erases=True),
        FgMode("masked", "the object, with the background replaced", erases=True),
        FgMode("late", "the object, with the background masked inside the network", in_network=True, takes_mask=True),
        FgMode("tokens", "only the tokens of the object", in_network=True, takes_mask=True, drops_tokens=True),
        FgMode("parts", "the object's parts, found by the network", in_network=True, finds_object=True, drops_tokens=True),
    )
}

"""THE table of fg modes: what the fg branch sees, and what follows from it for every other module."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FgMode:
    """One way to show the object to the fg branch (`docs/method.md`, section 1).

    Attributes:
        name: its name in a `ViewSpec`, a recipe and on the command line.
        words: what the branch sees, for a model card.
        crops: the view is cut to the object's box.
        erases: the background is replaced by the fill color before the view is cut.
        in_network: the branch looks at the whole image and the network masks it, so the view is that of `full`.
        takes_mask: the network is given the object's mask.
        finds_object: the network finds the object itself; boxes and masks are not used.
        drops_tokens: masked patches never enter the blocks of a ViT.
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
        FgMode("masked", "the object, the background painted over", erases=True),
        FgMode("late", "the object, the background masked in the network", in_network=True, takes_mask=True),
        FgMode("tokens", "the object alone, by its tokens", in_network=True, takes_mask=True, drops_tokens=True),
        FgMode("parts", "the object's parts, which it finds itself", in_network=True, finds_object=True, drops_tokens=True),
    )
}

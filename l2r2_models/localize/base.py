"""The protocol of a localizer, the spec string that names one, and what is done to every localizer's boxes.

A spec is `NAME[:SOURCE][?option=value&...]`, as in a URL:

    owlv2:google/owlv2-base-patch16-ensemble?prompt=mushroom&threshold=0.2
    owlv2:models/owlv2?prompt=animal&prompt=bird          several prompts
    grounding-dino:IDEA-Research/grounding-dino-tiny?prompt=crack&masks=sam:facebook/sam-vit-base
    boxes:file.json    ncut:runs/fungi    cam:runs/fungi    head:runs/fungi    center    full

It is stored in box files, runs and checkpoints, always in its canonical form: options that have their default value are left
out, the others stand in a fixed order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qsl, quote, unquote

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.ops import nms

from ..boxes.detections import Detections
from ..errors import L2R2Error

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class LocalizerSpec:
    """A localizer in words.

    Attributes:
        name: of the kind, e.g. `owlv2`.
        source: hub id, folder or file, "" where the kind needs none.
        options: values by name as text, several values of an option in order.
    """

    name: str
    source: str = ""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> LocalizerSpec:
        """From `NAME[:SOURCE][?option=value&...]`; `%`-escapes as in a URL, in the source too; `+` stays itself.

        Raises:
            L2R2Error: no name, or options that are not `option=value`.
        """
        head, _, query = text.partition("?")
        name, _, source = head.partition(":")
        if not name.strip():
            raise L2R2Error(f'"{text}" names no localizer; the form is NAME[:SOURCE][?option=value&...].')
        options: dict[str, tuple[str, ...]] = {}
        try:
            pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True) if query else []
        except ValueError:
            raise L2R2Error(f'"{text}": what follows the ? must be option=value, joined by &; a ? in a name is %3F.') from None
        for key, value in pairs:
            options[key] = (*options.get(key, ()), value)
        return cls(name.strip(), unquote(source), options)

    def __str__(self) -> str:
        pairs = [f"{key}={quote(v, safe=' /:,.@+()')}" for key, values in self.options.items() for v in values]
        source = self.source.replace("%", "%25").replace("?", "%3F")  # and no more: most paths stay as they are
        return self.name + (f":{source}" if source else "") + ("?" + "&".join(pairs) if pairs else "")

    def with_option(self, key: str, *values: str) -> LocalizerSpec:
        return replace(self, options={**self.options, key: values})


@dataclass(frozen=True)
class Option:
    """An option of a kind: how its text is read, its default, and what else is asked of it.

    Attributes:
        read: text -> value; a ValueError refuses.
        default: the value where the spec has none.
        what: ends the sentence "NAME must be ...".
        many: whether it may be given several times; its value is then a tuple.
    """

    read: Callable[[str], Any]
    default: Any
    what: str
    many: bool = False


def number(low: float, high: float) -> Callable[[str], float]:
    """A reader of finite numbers in [low, high]."""

    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(text)
        return value

    return read


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers in [low, high]."""

    def read(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return read


def one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


@dataclass(frozen=True)
class Context:
    """Where a localizer runs, and the checkpoint it belongs to, for the kinds that can look with its network."""

    device: torch.device
    checkpoint: Checkpoint | None = None


class Localizer(ABC):
    """Finds objects: `localizer(images) -> list[Detections]`, one for each image, best box first, clipped to the image.

    Subclasses declare `name`, `known_options` and what their `source` is, and implement `find`.

    Attributes:
        spec: canonical; makes an equal localizer again.
        options: the spec's values, read.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""  # what the source is, where the kind has one
    known_options: ClassVar[dict[str, Option]] = {}
    prompted: ClassVar[bool] = False

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        self.context = context
        self.options = self._read(spec)
        changed = [k for k, o in self.known_options.items() if k in spec.options and self.options[k] != o.default]
        self.spec = LocalizerSpec(spec.name, spec.source, {k: spec.options[k] for k in changed})

    def __call__(
        self, images: Sequence[Image], *, names: Sequence[str] | None = None, prompts: Sequence[str] | None = None
    ) -> list[Detections]:
        """Detections of images, boxes in pixels of each.

        Args:
            images: upright RGB images (`images.load_image`) of any sizes.
            names: their paths; `boxes:FILE` finds its entries by them.
            prompts: one for each image instead of the spec's: the true label is an oracle, for analysis only.

        Raises:
            L2R2Error: the network gives nothing but NaN; names or prompts are missing or not taken.
        """
        if prompts is not None and not self.prompted:
            raise L2R2Error(f"The localizer {self.spec} takes no prompt.")
        return self.find(list(images), names, prompts) if images else []

    @abstractmethod
    def find(self, images: list[Image], names: Sequence[str] | None, prompts: Sequence[str] | None) -> list[Detections]:
        """What `__call__` gives, for one image or more."""

    @property
    def lacks_prompt(self) -> bool:
        """Whether the spec would have to say what to look for, and does not."""
        return False

    def check_prompt(self) -> None:
        """To be called before the work, where no prompts of each image are given.

        Raises:
            L2R2Error: see `lacks_prompt`.
        """
        if self.lacks_prompt:
            how = f'"{self.spec.name}:...?prompt=mushroom"; `l2r2 localize` also takes --prompt mushroom'
            raise L2R2Error(f"The localizer {self.spec.name} needs a prompt: {how}.")

    @property
    def weights(self) -> str | None:
        """A digest of what the boxes depend on beside the spec; None where there is nothing."""
        return None

    def about(self, name: str) -> str | None:
        """What the boxes of one image depend on beside the image, the spec and the weights; None where there is nothing."""
        return None

    @property
    def info(self) -> dict[str, Any]:
        """What a box file says of its origin."""
        return {"localizer": str(self.spec), "weights": self.weights}

    def _read(self, spec: LocalizerSpec) -> dict[str, Any]:
        if unknown := sorted(set(spec.options) - set(self.known_options)):
            known = ", ".join(self.known_options) or "none"
            raise L2R2Error(f'The localizer "{spec}" has no option {unknown[0]}; it has {known}.')
        if spec.source and not self.source:
            raise L2R2Error(f'The localizer {spec.name} takes nothing after its name, got "{spec.source}".')
        if self.source and not spec.source and self.context.checkpoint is None:
            raise L2R2Error(f'The localizer {spec.name} needs {self.source}: "{spec.name}:...".')
        values = {key: option.default for key, option in self.known_options.items()}
        for key, texts in spec.options.items():
            option = self.known_options[key]
            if len(texts) > 1 and not option.many:
                raise L2R2Error(f'The localizer "{spec}" has {len(texts)} values of {key}; give one.')
            try:
                read = tuple(option.read(text) for text in texts)
            except ValueError:
                raise L2R2Error(f'The localizer "{spec}": {key} must be {option.what}, got "{", ".join(texts)}".') from None
            values[key] = read if option.many else read[0]
        return values


def tidy(
    boxes: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    labels: Sequence[str] = (),
    *,
    threshold: float = 0.0,
    nms_iou: float = 1.0,
    max_boxes: int | None = None,
) -> Detections:
    """Raw boxes as Detections: scores below the threshold and NaN go, boxes are clipped, those without a pixel go, overlapping
    ones go by non-maximum suppression over all labels, best first.

    Args:
        boxes: `[N, 4]` xyxy pixels.
        scores: `[N]`.
        image_size: `(height, width)`.
        labels: N strings.
        threshold: lowest score that is kept.
        nms_iou: of two boxes that overlap more than this the worse one goes; 1 keeps all.
        max_boxes: so many at most.

    Raises:
        L2R2Error: there are scores, and all of them are NaN.
    """
    if len(scores) and bool(scores.isnan().all()):
        raise L2R2Error("the localizer gives nothing but NaN; run it with dtype=float32, or its weights are damaged.")
    found = Detections(boxes.detach().float().cpu(), scores.detach().float().cpu().clamp(max=1), image_size, tuple(labels))
    found = found.above(threshold).usable().clipped().sorted()
    if nms_iou < 1:
        found = found.select(nms(found.boxes, found.scores, nms_iou))
    return found.select(torch.arange(min(len(found), max_boxes))) if max_boxes else found


def size_of(image: Image) -> tuple[int, int]:
    """`(height, width)`."""
    return image.height, image.width

"""The localizer protocol, the spec string that names a localizer, and the postprocessing of raw boxes.

A spec is `NAME[:SOURCE][?option=value&...]`, as in a URL:

    owlv2:google/owlv2-base-patch16-ensemble?prompt=mushroom&threshold=0.2
    owlv2:models/owlv2?prompt=animal&prompt=bird          several prompts
    grounding-dino:IDEA-Research/grounding-dino-tiny?prompt=crack&masks=sam:facebook/sam-vit-base
    detr:PekingU/rtdetr_v2_r18vd?classes=bird,dog         a detector with fixed classes
    attn:timm:vit_small_patch16_224.dino                  the network's own attention; likewise ncut and cam
    outlier    boxes:file.json    head:runs/fungi    mask-head:runs/fungi    center    full

Box files, runs and checkpoints store it in canonical form: options with their default value are left out, the others are in a
fixed order.
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
from torch.nn.functional import interpolate
from torchvision.ops import nms

from ..boxes.detections import Detections
from ..errors import L2R2Error

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class LocalizerSpec:
    """The name, source and options of a localizer.

    Attributes:
        name: a key of `LOCALIZERS`, e.g. `owlv2`.
        source: Hub id, folder or file; "" if the localizer needs none.
        options: values by option name, as text; an option given several times has several values.

    >>> LocalizerSpec.parse("owlv2:org/name?prompt=bird&prompt=bat").options
    {'prompt': ('bird', 'bat')}
    """

    name: str
    source: str = ""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> LocalizerSpec:
        """Parse `NAME[:SOURCE][?option=value&...]`.

        Source and options may be percent-encoded as in a URL; `+` is a literal plus.

        Raises:
            L2R2Error: when the name is missing or an option is not of the form `option=value`.
        """
        head, _, query = text.partition("?")
        name, _, source = head.partition(":")
        if not name.strip():
            raise L2R2Error(f'"{text}" does not name a localizer; write NAME[:SOURCE][?option=value&...].')
        options: dict[str, tuple[str, ...]] = {}
        try:
            pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=True) if query else []
        except ValueError:
            raise L2R2Error(f'"{text}": after the ?, write option=value pairs joined by &; write a ? in a name as %3F.') from None
        for key, value in pairs:
            options[key] = (*options.get(key, ()), value)
        return cls(name.strip(), unquote(source), options)

    def __str__(self) -> str:
        pairs = [f"{key}={quote(v, safe=' /:,.@+()')}" for key, values in self.options.items() for v in values]
        source = self.source.replace("%", "%25").replace("?", "%3F")  # other characters are kept, so that paths stay readable
        return self.name + (f":{source}" if source else "") + ("?" + "&".join(pairs) if pairs else "")

    def with_option(self, key: str, *values: str) -> LocalizerSpec:
        """Return a copy with one option set."""
        return replace(self, options={**self.options, key: values})


@dataclass(frozen=True)
class Option:
    """How an option of a localizer is parsed and described.

    Attributes:
        read: parses the text; raises ValueError if it is invalid.
        default: the value if the spec does not set the option.
        what: completes the error message "NAME must be ...".
        many: whether the option may be given several times; its value is then a tuple.
    """

    read: Callable[[str], Any]
    default: Any
    what: str
    many: bool = False


def number(low: float, high: float) -> Callable[[str], float]:
    """Make a parser of finite numbers in [low, high]."""

    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(text)
        return value

    return read


def whole(low: int, high: int) -> Callable[[str], int]:
    """Make a parser of integers in [low, high]."""

    def read(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return read


def one_of(*names: str) -> Callable[[str], str]:
    """Make a parser that accepts only these names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


@dataclass(frozen=True)
class Context:
    """The device of a localizer, and the checkpoint whose network it may use."""

    device: torch.device
    checkpoint: Checkpoint | None = None


class Localizer(ABC):
    """Finds objects: `localizer(images) -> list[Detections]`, one per image, best box first, clipped to the image.

    Subclasses declare `name`, `known_options` and what their `source` is, and implement `find`.

    Attributes:
        spec: canonical spec; `create_localizer(spec)` makes an equal localizer.
        options: parsed values by option name.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""  # what kind of source it takes, for messages; "" if none
    known_options: ClassVar[dict[str, Option]] = {}
    prompted: ClassVar[bool] = False
    license: str | None = None  # of the weights; set by `create_localizer` where it is known

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        self.context = context
        self.options = self._read(spec)
        changed = [k for k, o in self.known_options.items() if k in spec.options and self.options[k] != o.default]
        self.spec = LocalizerSpec(spec.name, spec.source, {k: spec.options[k] for k in changed})

    def __call__(
        self, images: Sequence[Image], *, names: Sequence[str] | None = None, prompts: Sequence[str] | None = None
    ) -> list[Detections]:
        """Find the objects in images.

        Args:
            images: upright RGB images (`images.load_image`) of any sizes.
            names: their paths, by which `boxes:FILE` finds its entries.
            prompts: one prompt per image, instead of the spec's. Prompting with the true label is an oracle, for analysis only.

        Returns:
            One `Detections` per image, with boxes in pixels of that image.

        Raises:
            L2R2Error: when all scores are NaN, names or a prompt are missing, or the localizer takes no prompts.
        """
        if prompts is not None and not self.prompted:
            raise L2R2Error(f"The localizer {self.spec} takes no prompt.")
        return self.find(list(images), names, prompts) if images else []

    @abstractmethod
    def find(self, images: list[Image], names: Sequence[str] | None, prompts: Sequence[str] | None) -> list[Detections]:
        """Implement `__call__` for at least one image."""

    @property
    def lacks_prompt(self) -> bool:
        """Whether the localizer needs a prompt that its spec does not have."""
        return False

    def check_prompt(self) -> None:
        """Check, before any work starts, that the spec has a prompt if the localizer needs one.

        Raises:
            L2R2Error: when the prompt is missing.
        """
        if self.lacks_prompt:
            how = f'"{self.spec.name}:...?prompt=mushroom"; `l2r2 localize` also takes --prompt mushroom; `outlier` needs none'
            raise L2R2Error(f"The localizer {self.spec.name} needs a prompt: {how}.")

    @property
    def weights(self) -> str | None:
        """Digest of the weights that the boxes depend on; None if there are none."""
        return None

    def about(self, name: str) -> str | None:
        """What else the boxes of this image depend on, besides image, spec and weights; None if nothing."""
        return None

    @property
    def info(self) -> dict[str, Any]:
        """What a box file records about how its boxes were made."""
        license = {"license": self.license} if self.license else {}
        return {"localizer": str(self.spec), "weights": self.weights, **license}

    def _read(self, spec: LocalizerSpec) -> dict[str, Any]:
        if unknown := sorted(set(spec.options) - set(self.known_options)):
            known = ", ".join(self.known_options) or "none"
            raise L2R2Error(f'The localizer "{spec}" has no option {unknown[0]}; its options are: {known}.')
        if spec.source and not self.source:
            raise L2R2Error(f'The localizer {spec.name} takes no source after its name, got "{spec.source}".')
        if self.source and not spec.source and self.context.checkpoint is None:
            raise L2R2Error(f'The localizer {spec.name} needs {self.source}; write "{spec.name}:...".')
        values = {key: option.default for key, option in self.known_options.items()}
        for key, texts in spec.options.items():
            option = self.known_options[key]
            if len(texts) > 1 and not option.many:
                raise L2R2Error(f'The localizer "{spec}" has {len(texts)} values for {key}; give one.')
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
    masks: Tensor | None = None,
    *,
    threshold: float = 0.0,
    nms_iou: float = 1.0,
    max_boxes: int | None = None,
) -> Detections:
    """Turn raw boxes into `Detections`.

    Drops NaN scores, scores below the threshold and boxes without a pixel inside the image; clips the rest, applies
    class-agnostic non-maximum suppression, and sorts by score.

    Args:
        boxes: `[N, 4]` xyxy pixels.
        scores: `[N]`.
        image_size: `(height, width)`.
        labels: N strings.
        masks: `[N, h, w]` probabilities at any resolution of the whole image; those of the boxes that are kept are resized to it.
        threshold: minimum score to keep.
        nms_iou: IoU above which the box with the lower score is dropped; 1 keeps all.
        max_boxes: maximum number of boxes to keep; None keeps all.

    Raises:
        L2R2Error: when there are boxes and all scores are NaN.
    """
    if len(scores) and bool(scores.isnan().all()):
        raise L2R2Error("all scores of the localizer are NaN; try dtype=float32, or check its weights.")
    found = Detections(boxes.detach().float().cpu(), scores.detach().float().cpu().clamp(max=1), image_size, tuple(labels))
    _, usable = found.windows()
    kept = ((found.scores >= threshold) & usable).nonzero()[:, 0]
    kept = kept[torch.argsort(found.scores[kept], descending=True, stable=True)]
    found = found.clipped()
    if nms_iou < 1:
        kept = kept[nms(found.boxes[kept], found.scores[kept], nms_iou)]
    kept = kept[:max_boxes]
    return replace(found.select(kept), masks=None if masks is None else _resized(masks.cpu()[kept], image_size))


def _resized(masks: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks `[N, H, W]` bool, from probabilities `[N, h, w]`."""
    if not len(masks):
        return torch.zeros(0, *image_size, dtype=torch.bool)
    return interpolate(masks[None].float(), image_size, mode="bilinear", align_corners=False)[0] > 0.5


def size_of(image: Image) -> tuple[int, int]:
    """Return `(height, width)` of an image."""
    return image.height, image.width

"""What the page shows of a photo, apart from how: predictions, saliency maps, and the object on another background."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..audit.perturbations import Subject, swap
from ..audit.samples import shrunk
from ..boxes.detections import Detections
from ..errors import L2R2Error
from ..evaluate.parts import parts_of
from ..explain.explainer import Explainer
from ..fusion import MetadataPrior
from ..images import MAX_PIXELS, image_tensor, list_images, load_image
from ..models.ifam import IFAM
from ..predict.prediction import Answer, ObjectPrediction
from ..predict.predictor import Predictor
from ..predict.rules import ImagePrior
from ..report.explain import pictures
from ..report.html import Picture
from ..report.parts import draw_parts
from .mask import Stroke, box_of, painted, rectangle, uses_mask

MOST_BACKGROUNDS = 24  # images of the folder that are offered
BACKGROUND_SIDE = 1600  # pixels; a background is no larger than that
BAD_BOX = "A box is four numbers, x0, y0, x1, y1, in pixels of the photo."


@dataclass(frozen=True)
class Photo:
    """What one visitor looks at.

    Attributes:
        image: the upright photo.
        name: its file name.
        boxes: the objects, best first; empty for the whole image.
        scores: scores of the boxes.
        chosen: index of the box that is looked at.
        masks: the localizer's mask `[H, W]` bool of each object, if it finds masks.
        edited: mask `[H, W]` bool that replaces the one of the chosen object, after painting or erasing.
        background: uint8 `[h, w, 3]` to move the object to, or None.
        dropped: indices of the parts that an iFAM model must do without.
        metadata: values of the columns of the prior, as far as they are known.
    """

    image: Image.Image
    name: str
    boxes: tuple[tuple[float, ...], ...] = ()
    scores: tuple[float, ...] = ()
    chosen: int = 0
    masks: tuple[Tensor, ...] = ()
    edited: Tensor | None = None
    background: Tensor | None = None
    dropped: tuple[int, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def box(self) -> tuple[float, ...] | None:
        """The chosen box xyxy in pixels, grown to contain what was painted, or None."""
        box = self.boxes[self.chosen] if self.boxes else None
        if self.edited is None or not (self.edited & ~rectangle(box, self.image.height, self.image.width)).any():
            return box
        around = box_of(self.edited)
        if box is None or around is None:
            return around
        return (min(box[0], around[0]), min(box[1], around[1]), max(box[2], around[2]), max(box[3], around[3]))

    @property
    def mask(self) -> Tensor | None:
        """The mask `[H, W]` bool of the object, or None if its box is all that is known."""
        return self.edited if self.edited is not None else self.masks[self.chosen] if self.masks else None

    @property
    def kept(self) -> Tensor:
        """The pixels `[H, W]` bool of the object: its mask, or else its box."""
        return rectangle(self.box, self.image.height, self.image.width) if self.mask is None else self.mask

    def with_boxes(self, boxes: Sequence[Sequence[float]], scores: Sequence[float] = (), masks: Sequence[Tensor] = ()) -> Photo:
        """Return the photo with other objects, the first of which is chosen."""
        rounded = tuple(tuple(round(v, 1) for v in box) for box in boxes)
        return replace(self, boxes=rounded, scores=tuple(scores), masks=tuple(masks), chosen=0, edited=None)


@dataclass(frozen=True)
class Look:
    """The predictions for one image.

    Attributes:
        image: the image.
        answers: the most probable classes by output, the model's own prediction last.
        reason: why this is the prediction.
        maps: pictures of the saliency, empty if they were not asked for.
        parts: the parts that an iFAM model finds and uses; None for other models.
        named: the prediction, if it is a group of classes or `unknown`; else empty.
    """

    image: Image.Image
    answers: dict[str, list[Answer]]
    reason: str
    maps: list[Picture]
    parts: Image.Image | None = None
    named: str = ""


class Studio:
    """Look at photos with one model.

    Args:
        explainer: the model, with its localizer and its rules.
        backgrounds: folder of background images, or None.
        max_pixels: maximum width * height of a photo.
        prior: corrects predictions by the metadata of the photo, or None.

    Raises:
        L2R2Error: when the folder has no image that can be read.
    """

    def __init__(
        self,
        explainer: Explainer,
        backgrounds: Path | None = None,
        max_pixels: int = MAX_PIXELS,
        prior: MetadataPrior | None = None,
    ) -> None:
        self.explainer, self.max_pixels, self.prior = explainer, max_pixels, prior
        finds_object = explainer.model.finds_object  # without a box
        self.localizer = None if finds_object else explainer.predictor.localizer
        self.predictor = explainer.predictor.keeping_logits()
        self.predictor.localizer = None  # it runs when it is asked to
        self.fill = self.predictor.model.view_spec.fill
        network = self.predictor.model
        self.uses_mask = uses_mask(network)
        self.ifam = network if isinstance(network, IFAM) else None
        self.parts = 0 if self.ifam is None else self.ifam.parts.num_parts
        self.backgrounds = [] if backgrounds is None else self._read_backgrounds(backgrounds)

    def _read_backgrounds(self, folder: Path) -> list[tuple[str, Image.Image]]:
        paths, found = list_images([folder]), []
        count = min(len(paths), MOST_BACKGROUNDS)
        for path in (paths[i * len(paths) // count] for i in range(count)):
            try:
                found.append((path.name, self._small(load_image(path, fill=self.fill))))
            except L2R2Error:  # other images of the folder will do
                continue
        if not found:
            raise L2R2Error(f"{folder}: has no image that can be read; pass a folder of background images.")
        return found

    @staticmethod
    def _small(image: Image.Image) -> Image.Image:
        image.thumbnail((BACKGROUND_SIDE, BACKGROUND_SIDE), Image.Resampling.LANCZOS)
        return image

    def open(self, before: Photo | None, path: str) -> Photo:
        """Read a photo; the background and the parts that were chosen before stay.

        Raises:
            L2R2Error: when the file is not an image, or too large.
        """
        image = self._read(path)
        photo = Photo(image, Path(path).name)
        return (
            photo
            if before is None
            else replace(photo, background=before.background, dropped=before.dropped, metadata=before.metadata)
        )

    def _read(self, path: str) -> Image.Image:
        return load_image(Path(path).read_bytes(), fill=self.fill, max_pixels=self.max_pixels, name=Path(path).name)

    def find(self, photo: Photo) -> Photo:
        """Let the localizer find the objects.

        Raises:
            L2R2Error: when it fails, or finds no object.
        """
        _, found, prediction = self.explainer.predictor.look_at(photo.image, name=photo.name)
        if found is None:
            why = prediction.reason.removesuffix("; classified from the whole image")
            raise L2R2Error(f"{why[:1].upper()}{why[1:]}; draw a box around the object.")
        return photo.with_boxes(found.boxes.tolist(), found.scores.tolist(), () if found.masks is None else list(found.masks))

    def draw(self, photo: Photo, box: Sequence[float]) -> Photo:
        """Use this box xyxy, relative to the width and height of the photo.

        Raises:
            L2R2Error: when it is not a box, or lies outside the photo.
        """
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise L2R2Error(BAD_BOX)
        return self._boxed(photo, [v * side for v, side in zip(box, photo.image.size * 2)])

    @staticmethod
    def _boxed(photo: Photo, box: Sequence[float]) -> Photo:
        width, height = photo.image.size
        x0, y0, x1, y1 = box
        ordered = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
        found = Detections.from_lists([ordered], (height, width)).clipped().usable()
        if not len(found):
            raise L2R2Error(f"The box covers no pixel of the photo, which has {width} x {height}; draw it on the object.")
        return photo.with_boxes(found.boxes.tolist(), [1.0])

    def write(self, photo: Photo, text: str) -> Photo:
        """Use a box xyxy in pixels that was typed; an empty text is the whole image.

        Raises:
            L2R2Error: as `draw` does.
        """
        if not text.strip():
            return self.whole(photo)
        try:
            x0, y0, x1, y1 = (float(part) for part in text.replace(",", " ").split())
        except ValueError:
            raise L2R2Error(BAD_BOX) from None
        return self._boxed(photo, (x0, y0, x1, y1))

    def whole(self, photo: Photo) -> Photo:
        """Look at the whole image."""
        return photo.with_boxes([])

    def choose(self, photo: Photo, index: int) -> Photo:
        """Look at another of the objects."""
        return replace(photo, chosen=min(max(index, 0), max(len(photo.boxes) - 1, 0)), edited=None)

    def paint(self, photo: Photo, sent: Any) -> Photo:
        """Add a stroke to the mask of the object, or erase along it; without a box, what is painted is the object.

        Args:
            photo: the photo.
            sent: the stroke as a browser sends it, see `Stroke`.

        Raises:
            L2R2Error: when it is not a stroke, the model does not use masks, or there is nothing to erase.
        """
        if not self.uses_mask:
            raise L2R2Error("This model does not use masks; draw a box around the object.")
        stroke = Stroke.read(sent)
        if stroke.erase and not photo.kept.any():
            raise L2R2Error("There is nothing to erase; draw a box around the object, or paint it.")
        return replace(photo, edited=painted(photo.kept, stroke))

    def reset_mask(self, photo: Photo) -> Photo:
        """Forget what was painted and erased; the mask is the localizer's again, or the box."""
        return replace(photo, edited=None)

    def use_parts(self, photo: Photo, used: Any) -> Photo:
        """Let an iFAM model use these parts and no others; `used` are their indices as text.

        Raises:
            L2R2Error: when there is no such part, or none is used.
        """
        names = [str(k) for k in range(self.parts)]
        if not isinstance(used, list) or not used or not set(used) <= set(names):
            raise L2R2Error(f"Keep at least one of the {self.parts} parts.")
        return replace(photo, dropped=tuple(k for k, name in enumerate(names) if name not in used))

    @property
    def columns(self) -> dict[str, list[str]]:
        """The metadata columns of the prior, with the values that it was fitted with."""
        if self.prior is None:
            return {}
        seen = zip(*self.prior.cells)
        return {c.name: sorted(set(values) - {""}, key=_in_order) for c, values in zip(self.prior.columns, seen)}

    def describe(self, photo: Photo, *values: Any) -> Photo:
        """Use this metadata, one value for each of `columns`; "" for one that is not known.

        Raises:
            L2R2Error: when a value is none of a column.
        """
        columns = self.columns
        if len(values) != len(columns) or not all(v in ("", *known) for v, known in zip(values, columns.values())):
            raise L2R2Error("There is no such value; choose one of each list.")
        return replace(photo, metadata={name: v for name, v in zip(columns, values) if v})

    def _for(self, photo: Photo) -> tuple[Predictor, Explainer]:
        """Return the predictor and the explainer, which correct predictions by the metadata of the photo."""
        if self.prior is None or not photo.metadata:
            return self.predictor, self.explainer
        rules = replace(self.predictor.rules, prior=ImagePrior(self.prior, {photo.name: photo.metadata}, ""))
        return self.predictor.with_rules(rules), self.explainer.with_rules(rules)

    @contextmanager
    def _without(self, parts: tuple[int, ...]) -> Iterator[None]:
        if self.ifam is None:
            yield
        else:
            with self.ifam.intervened(parts):
                yield

    def put_on(self, photo: Photo, index: int) -> Photo:
        """Move the object to a background of the folder.

        Raises:
            L2R2Error: when there is no such background.
        """
        if not isinstance(index, int) or not 0 <= index < len(self.backgrounds):
            raise L2R2Error(f"There are {len(self.backgrounds)} backgrounds; choose one of them.")
        return replace(photo, background=image_tensor(self.backgrounds[index][1]))

    def put_on_photo(self, photo: Photo, path: str) -> Photo:
        """Move the object to another photo.

        Raises:
            L2R2Error: when the file is not an image, or too large.
        """
        return replace(photo, background=image_tensor(self._small(self._read(path))))

    def put_back(self, photo: Photo) -> Photo:
        """Leave the object on its own background."""
        return replace(photo, background=None)

    def look(self, photo: Photo, saliency: bool = False) -> Look:
        """Predict the photo as it is.

        Raises:
            L2R2Error: when the network's output is not finite, or it does not support the saliency method.
        """
        return self._look(photo, photo.image, photo.box, photo.mask, saliency)

    def look_elsewhere(self, photo: Photo, saliency: bool = False) -> Look | None:
        """Predict the object on the background that was chosen; None without one.

        Raises:
            L2R2Error: when there is no object, and as `look` does.
        """
        if photo.background is None:
            return None
        if photo.box is None or not photo.kept.any():
            what = "draw a box around it" if photo.box is None else "paint it"
            raise L2R2Error(f"To see the object on another background, {what} first.")
        box, mask = torch.tensor([photo.box]), photo.mask
        subject = shrunk(Subject(photo.name, image_tensor(photo.image), box, mask, mask))
        image = Image.fromarray(swap(subject, photo.background).numpy())
        return self._look(photo, image, subject.boxes[0].tolist(), subject.view_mask, saliency)

    def _look(self, photo: Photo, image: Image.Image, box: Sequence[float] | None, mask: Tensor | None, saliency: bool) -> Look:
        size = (image.height, image.width)
        score = photo.scores[photo.chosen] if photo.scores else 1.0
        given = None if box is None else Detections.from_lists([box], size, [score])
        if given is not None and mask is not None:
            given = replace(given, masks=mask[None])
        predictor, explainer = self._for(photo)
        with self._without(photo.dropped):
            _, _, prediction = predictor.look_at(image, given, name=photo.name)
            if prediction.failure is not None:
                raise L2R2Error(prediction.failure)
            nothing = Detections.from_lists([], size)  # None would ask the localizer
            maps = pictures(explainer(image, nothing if given is None else given, name=photo.name))[1:] if saliency else []
            parts = None if self.ifam is None else draw_parts(parts_of(self.ifam, image_tensor(image)), 0)
        answer = prediction.objects[0]
        named = "" if answer.label == answer.top[0].label else answer.label
        return Look(image, self._answers(answer, bool(photo.metadata)), answer.reason, maps, parts, named)

    def _answers(self, answer: ObjectPrediction, corrected: bool) -> dict[str, list[Answer]]:
        """Return the most probable classes of each branch, and of their fusion or, `corrected` by a prior, their correction."""
        found: dict[str, list[Answer]] = {}
        for branch in self.predictor.model.branches:
            best = getattr(answer, branch)
            if answer.logits is not None:
                spread = self.predictor.rules.restricted(torch.tensor(answer.logits[branch])).softmax(0)
                top = spread.topk(len(answer.top))
                found[branch] = [Answer(self.predictor.labels[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist())]
            elif best is not None:
                found[branch] = list(answer.top) if best == answer.top[0] else [best]  # without a box, full is the prediction
        return {**found, "fused": list(answer.top)} if corrected or len(self.predictor.model.branches) > 1 else found


def _in_order(value: str) -> tuple[float, str]:
    """Sort key of metadata: numbers first, by size."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value

"""End-to-end prediction for images and folders: boxes, views, branches, fusion, and a reason for the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from PIL import Image
from torch import Tensor

from ..boxes import BoxEntry
from ..boxes.detections import Detections
from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..errors import L2R2Error
from ..fusion import ObjectnessMaxConfidence
from ..images import ImageSource, load_image, load_mask
from ..localize import Localizer, create_localizer
from ..localize.model_based import Head, detections_of
from ..models.l2r2 import L2R2Output
from ..views import make_views
from .adapt import DIGITS, Adapter
from .finite import checked
from .prediction import Answer, ObjectPrediction, Prediction, product, why_full, why_fused

BATCH_PIXELS = 50_000_000  # of decoded originals held in memory at once
LOCALIZER_FAILED = "the localizer failed"  # prefix of the reason of such a prediction
Boxes = Detections | Sequence[Sequence[float]]


@dataclass(frozen=True)
class _Item:
    """One image on its way through the predictor."""

    name: str | None
    image: Image.Image
    boxes: Detections | None
    localizer_failure: str | None = None
    mask: Tensor | None = None
    full: Tensor | None = None  # logits of the full branch, if the pass that found the box computed them


class _Row(NamedTuple):
    """One box to classify, of image `item`; NaN if there is none, with the reason in `why`."""

    item: int
    box: Tensor
    score: float | None
    why: str
    mask: Tensor | None


class Predictor:
    """Classify images with a checkpoint.

    Args:
        checkpoint: see `load_checkpoint`.
        box_threshold: boxes with a lower score count as not found. Boxes given without a score have 1.
        max_objects: maximum number of boxes to classify per image, best first.
        batch_size: objects per forward pass.
        top: number of classes in `ObjectPrediction.top`.
        device: defaults to CUDA if available.
        localizer: spec (see `localize.base`) or Localizer that finds the boxes of images given without any. `head` is the box
            head of the model itself: one pass over the whole image, then one over the boxes that it found.
        topk_prompts: number of top classes of the full branch to prompt the localizer with, see `localize.topk`.

    Raises:
        L2R2Error: when the model does not take RGB, a value is out of range, or the localizer is unavailable or does not suit
            the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        box_threshold: float | None = None,
        max_objects: int = 10,
        batch_size: int = 32,
        top: int = 3,
        device: str | torch.device | None = None,
        localizer: str | Localizer | None = None,
        topk_prompts: int | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = checkpoint.model.to(self.device).eval()
        if self.model.in_chans != 3:
            raise L2R2Error(f"{checkpoint.name}: takes {self.model.in_chans} channels, but Predictor reads RGB; use the model.")
        self.labels = checkpoint.labels
        for what, value in (("max_objects", max_objects), ("batch_size", batch_size), ("top", top)):
            if value < 1:
                raise L2R2Error(f"{what} must be at least 1, got {value}.")
        self.box_threshold = checkpoint.box_threshold if box_threshold is None else box_threshold
        self.max_objects, self.batch_size, self.top = max_objects, batch_size, min(top, len(self.labels))
        if isinstance(localizer, str):
            localizer = create_localizer(localizer, device=self.device, checkpoint=checkpoint)
        self.localizer: Localizer | None = localizer
        self.topk_prompts = topk_prompts
        self.keep_logits = False
        if topk_prompts is None and self.localizer is not None:
            self.localizer.check_prompt()
        if topk_prompts is not None:
            from ..localize.topk import check_promptable

            if topk_prompts < 1 or self.localizer is None:
                raise L2R2Error("topk_prompts is a number of classes, at least 1, for a localizer that is given too.")
            check_promptable(self.localizer, self.model)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Predictor:
        """Load from a run folder or a Hub id (`org/name`, `hf-hub:org/name@revision`); options as for `Predictor`."""
        return cls(load_checkpoint(source), **options)

    @overload  # bytes are a sequence too, but not of images
    def __call__(self, image: ImageSource, boxes: Boxes | None = None) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, image: Sequence[ImageSource], boxes: Sequence[Boxes | None] | None = None) -> list[Prediction]: ...

    def __call__(self, image: Any, boxes: Any = None) -> Prediction | list[Prediction]:
        """Classify one image or several.

        Args:
            image: path, encoded bytes, binary file object, PIL image, or a uint8 array or tensor `[H, W, 3]` or `[H, W]`; or a
                list of these, which gives a list of predictions.
            boxes: `Detections`, or xyxy boxes in pixels of the upright image; for several images, one entry (or None) per
                image. If None, the predictor's localizer finds the boxes; without one, the full branch answers.

        Raises:
            ImageError: when an image cannot be read.
            TypeError: when an image is of another type.
            L2R2Error: when the number of box entries is not the number of images, or boxes are for another image size.

        >>> predict = Predictor.from_pretrained("runs/fungi")  # doctest: +SKIP
        >>> predict("photo.jpg", boxes=[[130, 42, 410, 380]]).label  # doctest: +SKIP
        'chanterelle'
        """
        if not isinstance(image, (list, tuple)):
            return self._predict([self._given(image, boxes)])[0]
        if boxes is not None and len(boxes) != len(image):
            raise L2R2Error(f"{len(boxes)} entries of boxes for {len(image)} images; give one for each, None for no boxes.")
        found: list[Prediction] = []
        batch: list[_Item] = []
        for one, of_one in zip(image, boxes or [None] * len(image)):
            batch.append(self._given(one, of_one))
            if _is_full(batch, self.batch_size):
                found += self._predict(batch)
                batch = []
        return found + (self._predict(batch) if batch else [])

    def predict_many(
        self, images: Sequence[ImageSource], boxes: Sequence[Boxes | None] | None = None, *, groups: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Classify several images, given which of them share a place.

        Args:
            images: see `__call__`.
            boxes: see `__call__`.
            groups: place of each image, e.g. the camera; if None, each image is classified on its own.

        Raises:
            L2R2Error: as for `__call__`, or when the number of groups is not the number of images, or the fusion has no batch
                rule.
        """
        if groups is None:
            return self(images, boxes)
        if len(groups) != len(images):
            raise L2R2Error(f"{len(groups)} groups for {len(images)} images; give one for each.")
        adapter, found = self.adapter("group"), self.keeping_logits()(images, boxes)
        adapter.learn((o, group) for prediction, group in zip(found, groups) for o in prediction.objects)
        adapted = adapter.adapt(o for prediction in found for o in prediction.objects)
        return [replace(p, objects=tuple(replace(next(adapted), logits=None) for _ in p.objects)) for p in found]

    def keeping_logits(self) -> Predictor:
        """Return a copy of this predictor that also returns the branch logits."""
        keeping = copy.copy(self)
        keeping.keep_logits = True
        return keeping

    def adapter(self, noun: str) -> Adapter:
        """Return an `Adapter` that jointly fuses the predictions of a group; `noun` is the word for a group in messages.

        Raises:
            L2R2Error: when the fusion has no batch rule, or `topk_prompts` is set, which fuses differently.
        """
        if self.topk_prompts is not None:
            raise L2R2Error("Predictions by topk_prompts cannot be adapted to their place.")
        return Adapter(copy.deepcopy(self.model.fusion).cpu().float(), self.labels, self.top, noun)

    @torch.inference_mode()
    def look_at(
        self, image: ImageSource, boxes: Boxes | None = None, mask: Tensor | None = None, name: str | None = None
    ) -> tuple[Image.Image, Detections | None, Prediction]:
        """Classify one image; return the decoded image, its usable boxes (best first), and the prediction.

        Args:
            image: see `__call__`.
            boxes: see `__call__`.
            mask: `[H, W]` bool mask of the object, for boxes without masks.
            name: file name, for a localizer that looks boxes up by it.
        """
        item = replace(self._given(image, boxes), name=name, mask=mask)
        if self.localizer is not None and item.boxes is None:
            item = self._localize([item])[0]
        found = self._usable(item)[0]
        if found is not None and found.masks is None and mask is not None:
            found = replace(found, masks=mask.expand(len(found), -1, -1))
        return item.image, found, checked(self._classify([item]))[0]

    def _given(self, image: ImageSource, boxes: Boxes | None) -> _Item:
        name = str(image) if isinstance(image, (str, Path)) else None
        loaded = load_image(image, fill=self.model.view_spec.fill)
        size = (loaded.height, loaded.width)
        if boxes is not None and not isinstance(boxes, Detections):
            boxes = Detections.from_lists(boxes, size)
        if boxes is not None and boxes.image_size != size:
            raise L2R2Error(f"{name or 'image'}: boxes of a {boxes.image_size} image (height, width), this one is {size}.")
        return _Item(name, loaded, boxes)

    def predict_files(
        self, paths: Iterable[Path], boxes: Mapping[str, BoxEntry] | None = None, masks: Mapping[str, Path] | None = None
    ) -> Iterator[Prediction]:
        """Classify files in batches; an unreadable file gives a `Prediction` with `failure` set.

        Args:
            paths: image files.
            boxes: box entries by `str(path)`, see `BoxTable.join`.
            masks: mask files by `str(path)`; without an entry in `boxes`, the tight box of the mask is used.
        """
        batch: list[_Item] = []
        done: list[Prediction | None] = []
        for path in paths:
            try:
                batch.append(self._load(path, (boxes or {}).get(str(path)), (masks or {}).get(str(path))))
                done.append(None)
            except L2R2Error as error:
                done.append(Prediction(str(path), (), str(error)))
            if _is_full(batch, self.batch_size):
                yield from _merge(done, self._predict(batch))
                batch, done = [], []
        yield from _merge(done, self._predict(batch) if batch else [])

    def _load(self, path: Path, entry: BoxEntry | None, mask_file: Path | None) -> _Item:
        image = load_image(path, fill=self.model.view_spec.fill)
        size = (image.height, image.width)
        mask = load_mask(mask_file, size) if mask_file else None
        if entry is not None:
            return _Item(str(path), image, entry.detections(size, str(path)), entry.failure, mask)
        return _Item(str(path), image, None if mask is None else Detections.from_mask(mask), None, mask)

    @torch.inference_mode()
    def _predict(self, items: Sequence[_Item]) -> list[Prediction]:
        if self.localizer is not None:
            lacking = [i for i, item in enumerate(items) if item.boxes is None and item.localizer_failure is None]
            if self.topk_prompts is not None and len(lacking) == len(items):
                return checked(self._ask(items))
            found = dict(zip(lacking, self._localize([items[i] for i in lacking]))) if lacking else {}
            items = [found.get(i, item) for i, item in enumerate(items)]
        return checked(self._classify(items))

    def _localize(self, items: Sequence[_Item]) -> list[_Item]:
        """Return the items with the boxes found; if the localizer fails on a batch, each image is tried alone."""
        assert self.localizer is not None
        images, names = [item.image for item in items], [item.name or "" for item in items]
        try:
            if isinstance(self.localizer, Head) and self.localizer.model is self.model:
                full = make_views(images, None, self.model.view_spec, branches=("full",), device=self.device).full
                out = self.model.forward_views(full=full)
                found = detections_of(out.located, images, self.model.view_spec)  # type: ignore[arg-type]
                return [replace(item, boxes=d, full=z) for item, d, z in zip(items, found, out.full)]  # type: ignore[arg-type]
            found = self.localizer(images, names=names if all(names) else None)
            return [replace(item, boxes=detections) for item, detections in zip(items, found)]
        except (L2R2Error, RuntimeError) as error:
            if len(items) == 1:
                return [replace(items[0], localizer_failure=" ".join(str(error).split())[:300])]
        return [found for item in items for found in self._localize([item])]

    def _ask(self, items: Sequence[_Item]) -> list[Prediction]:
        """Predict by `topk_prompts`; if none of the prompted classes is found, the full branch answers."""
        from ..localize.topk import check_promptable, topk_prompts

        assert self.localizer is not None and self.topk_prompts is not None
        localizer, images = check_promptable(self.localizer, self.model), [item.image for item in items]
        try:
            found = topk_prompts(self.model, self.labels, localizer, images, self.topk_prompts, self.box_threshold)
        except (L2R2Error, RuntimeError) as error:
            if len(items) == 1:
                return self._classify([replace(items[0], localizer_failure=" ".join(str(error).split())[:300])])
            return [prediction for item in items for prediction in self._ask([item])]
        predictions = []
        for i, item in enumerate(items):
            if not bool(found.boxes[i].isfinite().any()):
                predictions += self._classify([replace(item, boxes=Detections.from_lists([], item.image.size[::-1]))])
                continue
            parts, order = found.scores[i].softmax(0).tolist(), found.scores[i].argsort(descending=True).tolist()
            top = tuple(Answer(self.labels[int(found.classes[i, j])], round(parts[j], 6)) for j in order[: self.top])
            best, has_box = order[0], bool(found.boxes[i, order[0]].isfinite().all())
            said = {b: self._answer(z[i] if b == "full" else z[i, best]) for b, z in found.branches.items()}
            predictions.append(
                Prediction(
                    item.name,
                    (
                        ObjectPrediction(
                            label=top[0].label,
                            score=top[0].score,
                            source="fused" if has_box else "full",
                            reason=f"the best of the {len(order)} classes that the whole image suggests"
                            + ("" if has_box else "; it was not found, the whole image stands for it"),
                            full=said["full"],
                            fg=said["fg"] if has_box else None,
                            bg=said.get("bg") if has_box else None,
                            box=tuple(round(v, 2) for v in found.boxes[i, best].tolist()) if has_box else None,  # type: ignore[arg-type]
                            box_score=round(float(found.box_scores[i, best]), 4) if has_box else None,
                            top=top,
                        ),
                    ),
                )
            )
        return predictions

    def _answer(self, logits: Tensor) -> Answer:
        score, index = logits.float().softmax(-1).max(-1)
        return Answer(self.labels[int(index)], round(float(score), 6))

    def _classify(self, items: Sequence[_Item]) -> list[Prediction]:
        found = [self._usable(item) for item in items]
        rows: list[_Row] = []
        for i, (usable, why) in enumerate(found):
            if usable is None:
                rows.append(_Row(i, torch.full((4,), float("nan")), None, why, items[i].mask))
            else:
                masks = usable.masks if usable.masks is not None else [items[i].mask] * len(usable)
                rows += [_Row(i, box, s, "", mask) for box, s, mask in zip(usable.boxes, usable.scores.tolist(), masks)]
        answers: list[list[ObjectPrediction]] = [[] for _ in items]
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            output, has_fg = self._look(items, part)
            for row, answer in zip(part, self._answers(output, part, has_fg)):
                answers[row.item].append(answer)
        if isinstance(self.model.fusion, ObjectnessMaxConfidence):  # the box that gives the image's prediction first
            answers = [sorted(objects, key=product, reverse=True) for objects in answers]
        return [Prediction(item.name, tuple(objects)) for item, objects in zip(items, answers)]

    def _look(self, items: Sequence[_Item], rows: Sequence[_Row]) -> tuple[L2R2Output, list[bool]]:
        """Run the model on the rows; return its output and whether it saw an object in each."""
        used = sorted({row.item for row in rows})
        known = [items[row.item].full for row in rows]
        scores = torch.tensor([1.0 if row.score is None else row.score for row in rows], device=self.device)
        full = None if any(z is None for z in known) else torch.stack(known)  # type: ignore[arg-type]
        views = make_views(
            [items[i].image for i in used],
            torch.stack([row.box for row in rows]),
            self.model.view_spec,
            branches=[b for b in self.model.branches if b != "full" or full is None],
            image_index=torch.tensor([used.index(row.item) for row in rows]),
            masks=[row.mask for row in rows],
            device=self.device,
        )
        known_full = {} if full is None else {"full_logits": full}
        output = self.model.forward_views(**views.inputs(), objectness=scores, **known_full)
        return output, output.has_fg.tolist()

    def _usable(self, item: _Item) -> tuple[Detections | None, str]:
        """Return the boxes to classify, or None and the reason (`docs/method.md`, section 2)."""
        detections = item.boxes
        if self.model.finds_object:
            return None, "the network found no part of an object"  # it finds the object itself; boxes are not used
        if item.localizer_failure is not None:
            return None, f"{LOCALIZER_FAILED} ({item.localizer_failure})"
        if detections is None or not len(detections):
            return None, "no box was given" if detections is None else "no object was found"
        sure = detections.above(self.box_threshold)
        if not len(sure):
            return None, f"no box reaches the score {self.box_threshold:g} (best {detections.scores.max():.2f})"
        usable = sure.usable()
        if not len(usable):
            return None, "every box lies outside of the image or is empty"
        return usable.sorted().select(torch.arange(min(len(usable), self.max_objects))), ""

    def _answers(self, output: L2R2Output, rows: Sequence[_Row], has_fg: Sequence[bool]) -> Iterator[ObjectPrediction]:
        given = {**output.branches(), "fused": output.fused}
        best = {b: z.float().softmax(-1).topk(self.top if b == "fused" else 1) for b, z in given.items()}
        probabilities = {b: t.values.tolist() for b, t in best.items()}
        classes = {b: t.indices.tolist() for b, t in best.items()}
        for i, (_, box, box_score, why, _) in enumerate(rows):
            keep = self.keep_logits and has_fg[i]
            said = {b: [Answer(self.labels[c], round(p, 6)) for c, p in zip(classes[b][i], probabilities[b][i])] for b in best}
            found = has_fg[i] and "fg" in said
            yield ObjectPrediction(
                label=said["fused"][0].label,
                score=said["fused"][0].score,
                source="fused" if found else "full",
                reason=why_fused(said, self.model.fusion.over) if found else why_full(said, why or "the object's mask is empty"),
                full=said["full"][0] if "full" in said else None,
                fg=said["fg"][0] if found else None,
                bg=said["bg"][0] if has_fg[i] and "bg" in said else None,
                box=tuple(round(v, 2) for v in box.tolist()) if has_fg[i] and box.isfinite().all() else None,  # type: ignore[arg-type]
                box_score=None if box_score is None else round(box_score, 4),
                top=tuple(said["fused"]),
                logits={b: [round(v, DIGITS) for v in z[i].tolist()] for b, z in output.branches().items()} if keep else None,
            )


def _is_full(batch: Sequence[_Item], size: int) -> bool:
    """Return whether to predict the batch before decoding the next image."""
    return len(batch) >= size or sum(item.image.width * item.image.height for item in batch) > BATCH_PIXELS


def _merge(done: Sequence[Prediction | None], predicted: Sequence[Prediction]) -> Iterator[Prediction]:
    waiting = iter(predicted)
    for prediction in done:
        yield prediction if prediction is not None else next(waiting)

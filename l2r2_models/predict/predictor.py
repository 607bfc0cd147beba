"""Predictor: from images and boxes to predictions, through views, branches and fusion."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

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
from .items import Item, Row, is_full, merged
from .prediction import Answer, ObjectPrediction, Prediction, product, why_full, why_fused

EMPTY_MASK = "the object's mask is empty"
LOCALIZER_FAILED = "the localizer failed"  # prefix of the reason in that case
Boxes = Detections | Sequence[Sequence[float]]


class Predictor:
    """Classify images with a checkpoint.

    Args:
        checkpoint: see `load_checkpoint`.
        box_threshold: boxes with a lower score count as not found. Boxes without a score count as 1.
        max_objects: maximum number of boxes to classify per image, best first.
        batch_size: objects per forward pass.
        top: number of classes listed in `ObjectPrediction.top`.
        device: defaults to cuda if available.
        localizer: finds the boxes of images given without any: a spec (see `localize.base`) or a Localizer. `head` is the
            model's own box head: one forward pass on the whole image, then one on the boxes it found.
        topk_prompts: prompt the localizer with this many top classes of the full branch, see `localize.topk`.

    Raises:
        L2R2Error: when the model does not take RGB images, a number is out of range, or the localizer cannot be created or
            does not fit the model.
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
            raise L2R2Error(f"{checkpoint.name}: takes {self.model.in_chans} channels, but Predictor reads RGB; call the model.")
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
                raise L2R2Error("topk_prompts must be at least 1 and needs a localizer.")
            check_promptable(self.localizer, self.model)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Predictor:
        """Load a predictor from a run folder or Hub id (`org/name`, `hf-hub:org/name@revision`); options as for `Predictor`."""
        return cls(load_checkpoint(source), **options)

    @overload  # bytes are a sequence too, but not of images
    def __call__(self, image: ImageSource, boxes: Boxes | None = None) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, image: Sequence[ImageSource], boxes: Sequence[Boxes | None] | None = None) -> list[Prediction]: ...

    def __call__(self, image: Any, boxes: Any = None) -> Prediction | list[Prediction]:
        """Classify one image, or several.

        Args:
            image: path, encoded bytes, binary file object, PIL image, or a uint8 array or tensor `[H, W, 3]` or `[H, W]`; or a
                list of any of them, which gives a list of predictions.
            boxes: output of a localizer, or xyxy boxes in pixels of the upright image; for several images, one entry (or None)
                per image. If None, the predictor's localizer finds them; without a localizer, the full branch is used.

        Raises:
            ImageError: when an image cannot be read.
            TypeError: when `image` is of another type.
            L2R2Error: when there is not one entry of boxes per image, or the boxes are for another image size.

        >>> predict = Predictor.from_pretrained("runs/fungi")  # doctest: +SKIP
        >>> predict("photo.jpg", boxes=[[130, 42, 410, 380]]).label  # doctest: +SKIP
        'chanterelle'
        """
        if not isinstance(image, (list, tuple)):
            return self.predict_items([self._given(image, boxes)])[0]
        if boxes is not None and len(boxes) != len(image):
            raise L2R2Error(f"{len(boxes)} entries of boxes for {len(image)} images; pass one per image (None for no boxes).")
        found: list[Prediction] = []
        batch: list[Item] = []
        for one, of_one in zip(image, boxes or [None] * len(image)):
            batch.append(self._given(one, of_one))
            if is_full(batch, self.batch_size):
                found += self.predict_items(batch)
                batch = []
        return found + (self.predict_items(batch) if batch else [])

    def predict_many(
        self, images: Sequence[ImageSource], boxes: Sequence[Boxes | None] | None = None, *, groups: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Classify several images, given which of them were taken at the same place.

        Args:
            images, boxes: as for a call.
            groups: group of each image, e.g. its camera; None classifies each image separately.

        Raises:
            L2R2Error: as for a call, when there is not one group per image, or the fusion has no batch rule.
        """
        if groups is None:
            return self(images, boxes)
        if len(groups) != len(images):
            raise L2R2Error(f"{len(groups)} groups for {len(images)} images; pass one per image.")
        adapter, found = self.adapter("group"), self.keeping_logits()(images, boxes)
        adapter.learn((o, group) for prediction, group in zip(found, groups) for o in prediction.objects)
        adapted = adapter.adapt(o for prediction in found for o in prediction.objects)
        return [replace(p, objects=tuple(replace(next(adapted), logits=None) for _ in p.objects)) for p in found]

    def keeping_logits(self) -> Predictor:
        """Return a copy of the predictor that also keeps the logits of the branches."""
        keeping = copy.copy(self)
        keeping.keep_logits = True
        return keeping

    def adapter(self, noun: str) -> Adapter:
        """Return an `Adapter` that fuses the predictions of a group (named `noun` in messages) jointly.

        Raises:
            L2R2Error: when the fusion has no batch rule, or `topk_prompts` is set, which fuses in another way.
        """
        if self.topk_prompts is not None:
            raise L2R2Error("Predictions with topk_prompts cannot be adapted; use one or the other.")
        return Adapter(copy.deepcopy(self.model.fusion).cpu().float(), self.labels, self.top, noun)

    @torch.inference_mode()
    def look_at(
        self, image: ImageSource, boxes: Boxes | None = None, mask: Tensor | None = None, name: str | None = None
    ) -> tuple[Image.Image, Detections | None, Prediction]:
        """Classify one image; return the decoded image, its usable boxes (best first), and the prediction.

        Args:
            image, boxes: see `__call__`.
            mask: `[H, W]` bool, the object, for boxes without masks.
            name: file name, for localizers that use it.
        """
        item = replace(self._given(image, boxes), name=name, mask=mask)
        if self.localizer is not None and item.boxes is None:
            item = self._localize([item])[0]
        found = self._usable(item)[0]
        if found is not None and found.masks is None and mask is not None:
            found = replace(found, masks=mask.expand(len(found), -1, -1))
        return item.image, found, checked(self._classify([item]))[0]

    def _given(self, image: ImageSource, boxes: Boxes | None) -> Item:
        name = str(image) if isinstance(image, (str, Path)) else None
        loaded = load_image(image, fill=self.model.view_spec.fill)
        size = (loaded.height, loaded.width)
        if boxes is not None and not isinstance(boxes, Detections):
            boxes = Detections.from_lists(boxes, size)
        if boxes is not None and boxes.image_size != size:
            raise L2R2Error(f"{name or 'image'}: boxes for a {boxes.image_size} image (height, width), but it is {size}.")
        return Item(name, loaded, boxes)

    def predict_files(
        self, paths: Iterable[Path], boxes: Mapping[str, BoxEntry] | None = None, masks: Mapping[str, Path] | None = None
    ) -> Iterator[Prediction]:
        """Classify files in batches; an unreadable file becomes a Prediction with `failure`.

        Args:
            paths: image files.
            boxes: entries by `str(path)`, see `BoxTable.join`.
            masks: mask files by `str(path)`; without an entry in `boxes`, the tight box around the mask is used.
        """
        batch: list[Item] = []
        done: list[Prediction | None] = []
        for path in paths:
            try:
                batch.append(self._load(path, (boxes or {}).get(str(path)), (masks or {}).get(str(path))))
                done.append(None)
            except L2R2Error as error:
                done.append(Prediction(str(path), (), str(error)))
            if is_full(batch, self.batch_size):
                yield from merged(done, self.predict_items(batch))
                batch, done = [], []
        yield from merged(done, self.predict_items(batch) if batch else [])

    def _load(self, path: Path, entry: BoxEntry | None, mask_file: Path | None) -> Item:
        image = load_image(path, fill=self.model.view_spec.fill)
        size = (image.height, image.width)
        mask = load_mask(mask_file, size) if mask_file else None
        if entry is not None:
            return Item(str(path), image, entry.detections(size, str(path)), entry.failure, mask)
        return Item(str(path), image, None if mask is None else Detections.from_mask(mask), None, mask)

    @torch.inference_mode()
    def predict_items(self, items: Sequence[Item]) -> list[Prediction]:
        """Classify decoded images as one batch; the localizer finds the boxes of those without any."""
        if self.localizer is not None:
            lacking = [i for i, item in enumerate(items) if item.boxes is None and item.localizer_failure is None]
            if self.topk_prompts is not None and len(lacking) == len(items):
                return checked(self._predict_topk(items))
            found = dict(zip(lacking, self._localize([items[i] for i in lacking]))) if lacking else {}
            items = [found.get(i, item) for i, item in enumerate(items)]
        return checked(self._classify(items))

    def _localize(self, items: Sequence[Item]) -> list[Item]:
        """Return the items with their boxes; if the localizer fails on a batch, each image is tried alone."""
        assert self.localizer is not None
        images, names = [item.image for item in items], [item.name or "" for item in items]
        try:
            if isinstance(self.localizer, Head) and self.localizer.model is self.model:
                full = make_views(images, None, self.model.view_spec, branches=("full",), device=self.device).full
                out = self.model.forward_views(full=full)
                found = detections_of(out.located, images, self.model.view_spec)
                return [replace(item, boxes=d, full=z) for item, d, z in zip(items, found, out.full)]
            found = self.localizer(images, names=names if all(names) else None)
            return [replace(item, boxes=detections) for item, detections in zip(items, found)]
        except (L2R2Error, RuntimeError) as error:
            if len(items) == 1:
                return [replace(items[0], localizer_failure=" ".join(str(error).split())[:300])]
        return [found for item in items for found in self._localize([item])]

    def _predict_topk(self, items: Sequence[Item]) -> list[Prediction]:
        """Predict with `topk_prompts`; an image in which no prompted class is found is classified by the full branch."""
        from ..localize.topk import check_promptable, topk_prompts

        assert self.localizer is not None and self.topk_prompts is not None
        localizer, images = check_promptable(self.localizer, self.model), [item.image for item in items]
        try:
            found = topk_prompts(self.model, self.labels, localizer, images, self.topk_prompts, self.box_threshold)
        except (L2R2Error, RuntimeError) as error:
            if len(items) == 1:
                return self._classify([replace(items[0], localizer_failure=" ".join(str(error).split())[:300])])
            return [prediction for item in items for prediction in self._predict_topk([item])]
        predictions = []
        for i, item in enumerate(items):
            if not bool(found.boxes[i].isfinite().any()):
                predictions += self._classify([replace(item, boxes=Detections.from_lists([], item.image.size[::-1]))])
                continue
            parts, order = found.scores[i].softmax(0).tolist(), found.scores[i].argsort(descending=True).tolist()
            top = tuple(Answer(self.labels[int(found.classes[i, j])], round(parts[j], 6)) for j in order[: self.top])
            best, has_box = order[0], bool(found.boxes[i, order[0]].isfinite().all())
            answers = {b: self._answer(z[i] if b == "full" else z[i, best]) for b, z in found.branches.items()}
            predictions.append(
                Prediction(
                    item.name,
                    (
                        ObjectPrediction(
                            label=top[0].label,
                            score=top[0].score,
                            source="fused" if has_box else "full",
                            reason=f"the best of the {len(order)} classes suggested by the whole image"
                            + ("" if has_box else "; it was not found, so its score is from the whole image"),
                            full=answers["full"],
                            fg=answers["fg"] if has_box else None,
                            bg=answers.get("bg") if has_box else None,
                            box=tuple(round(v, 2) for v in found.boxes[i, best].tolist()) if has_box else None,
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

    def _classify(self, items: Sequence[Item]) -> list[Prediction]:
        found = [self._usable(item) for item in items]
        rows: list[Row] = []
        for i, (usable, why) in enumerate(found):
            if usable is None:
                rows.append(Row(i, torch.full((4,), float("nan")), None, why, items[i].mask))
            else:
                masks = usable.masks if usable.masks is not None else [items[i].mask] * len(usable)
                rows += [Row(i, box, s, "", mask) for box, s, mask in zip(usable.boxes, usable.scores.tolist(), masks)]
        answers: list[list[ObjectPrediction]] = [[] for _ in items]
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            output, has_fg = self._forward(items, part)
            for row, answer in zip(part, self._answers(output, part, has_fg)):
                answers[row.item].append(answer)
        if isinstance(self.model.fusion, ObjectnessMaxConfidence):  # the box that decides the image's label comes first
            answers = [sorted(objects, key=product, reverse=True) for objects in answers]
        return [Prediction(item.name, tuple(objects)) for item, objects in zip(items, answers)]

    def _forward(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[L2R2Output, list[bool]]:
        """Return the model output for the rows, and whether an object was found in each."""
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

    def _usable(self, item: Item) -> tuple[Detections | None, str]:
        """Return the boxes to classify, or None and the reason why there are none (`docs/method.md`, section 2)."""
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
            return None, "every box is empty or outside of the image"
        return usable.sorted().select(torch.arange(min(len(usable), self.max_objects))), ""

    def _answers(self, output: L2R2Output, rows: Sequence[Row], has_fg: Sequence[bool]) -> Iterator[ObjectPrediction]:
        given = {**output.branches(), "fused": output.fused}
        best = {b: z.float().softmax(-1).topk(self.top if b == "fused" else 1) for b, z in given.items()}
        probabilities = {b: t.values.tolist() for b, t in best.items()}
        classes = {b: t.indices.tolist() for b, t in best.items()}
        for i, (_, box, box_score, why, _) in enumerate(rows):
            keep = self.keep_logits and has_fg[i]
            answers = {b: [Answer(self.labels[c], round(p, 6)) for c, p in zip(classes[b][i], probabilities[b][i])] for b in best}
            found = has_fg[i] and "fg" in answers
            yield ObjectPrediction(
                label=answers["fused"][0].label,
                score=answers["fused"][0].score,
                source="fused" if found else "full",
                reason=why_fused(answers, self.model.fusion.over) if found else why_full(answers, why or EMPTY_MASK),
                full=answers["full"][0] if "full" in answers else None,
                fg=answers["fg"][0] if found else None,
                bg=answers["bg"][0] if has_fg[i] and "bg" in answers else None,
                box=tuple(round(v, 2) for v in box.tolist()) if has_fg[i] and box.isfinite().all() else None,
                box_score=None if box_score is None else round(box_score, 4),
                top=tuple(answers["fused"]),
                logits={b: [round(v, DIGITS) for v in z[i].tolist()] for b, z in output.branches().items()} if keep else None,
            )

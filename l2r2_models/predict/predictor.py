"""The whole way for one image or a folder: image, boxes, views, branches, fusion, and an answer that says why."""

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

LOCALIZER_FAILED = "the localizer failed"  # how the reason of such an answer begins
Boxes = Detections | Sequence[Sequence[float]]


class Predictor:
    """Classifies images with a checkpoint; takes paths or PIL images in, gives `Prediction`s out.

    Args:
        checkpoint: see `load_checkpoint`.
        box_threshold: boxes with a lower score count as not found. Boxes given without a score have 1.
        max_objects: how many boxes of an image are classified, best first.
        batch_size: objects in one pass.
        top: classes listed in `ObjectPrediction.top`.
        device: default cuda where there is one.
        localizer: finds the boxes of images that come without any: a spec (see `localize.base`) or a Localizer. `head` is the
            model's own box head: one pass over the whole image, then one over what it found.
        topk_prompts: the full branch's so many best classes are what the localizer is asked for, see `localize.topk`.

    Raises:
        L2R2Error: a model that does not take RGB, a number out of range, or a localizer that cannot be had or does not suit.
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
        """From a run's folder or a Hub id (`org/name`, `hf-hub:org/name@revision`); options as for `Predictor`."""
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
            boxes: what a localizer found, or xyxy boxes in pixels of the upright image (for several images one such for each, or
                None); None: the predictor's own localizer finds them, and without one the full branch answers.

        Raises:
            ImageError: an image cannot be read.
            TypeError: none of these kinds of image.
            L2R2Error: not one entry of boxes for each image, or boxes of another image size.

        >>> predict = Predictor.from_pretrained("runs/fungi")  # doctest: +SKIP
        >>> predict("photo.jpg", boxes=[[130, 42, 410, 380]]).label  # doctest: +SKIP
        'chanterelle'
        """
        if not isinstance(image, (list, tuple)):
            return self._predict([self._given(image, boxes)])[0]
        if boxes is not None and len(boxes) != len(image):
            raise L2R2Error(f"{len(boxes)} entries of boxes for {len(image)} images; give one for each, None for no boxes.")
        found: list[Prediction] = []
        batch: list[Item] = []
        for one, of_one in zip(image, boxes or [None] * len(image)):
            batch.append(self._given(one, of_one))
            if is_full(batch, self.batch_size):
                found += self._predict(batch)
                batch = []
        return found + (self._predict(batch) if batch else [])

    def predict_many(
        self, images: Sequence[ImageSource], boxes: Sequence[Boxes | None] | None = None, *, groups: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Classify several images, knowing which of them were taken at one place.

        Args:
            images, boxes: as for a call.
            groups: the place of each image, e.g. the camera; None: nothing is known, and each image is classified for itself.

        Raises:
            L2R2Error: as for a call, not one group for each image, or a model whose fusion was not fitted to know its batch.
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
        """The same predictor, which gives the branches' logits too."""
        keeping = copy.copy(self)
        keeping.keep_logits = True
        return keeping

    def adapter(self, noun: str) -> Adapter:
        """What fuses predictions of one place (a `noun`) together.

        Raises:
            L2R2Error: the fusion was not fitted to know its batch, or `topk_prompts` are asked for, which fuse otherwise.
        """
        if self.topk_prompts is not None:
            raise L2R2Error("Predictions by topk_prompts cannot be adapted to their place.")
        return Adapter(copy.deepcopy(self.model.fusion).cpu().float(), self.labels, self.top, noun)

    @torch.inference_mode()
    def look_at(
        self, image: ImageSource, boxes: Boxes | None = None, mask: Tensor | None = None, name: str | None = None
    ) -> tuple[Image.Image, Detections | None, Prediction]:
        """Classify one image, and give what the answer was made from: the decoded image and its usable boxes, best first.

        Args:
            image, boxes: see `__call__`.
            mask: `[H, W]` bool of the object, for boxes that bring none.
            name: the file's, for a localizer that goes by it.
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
            raise L2R2Error(f"{name or 'image'}: boxes of a {boxes.image_size} image (height, width), this one is {size}.")
        return Item(name, loaded, boxes)

    def predict_files(
        self, paths: Iterable[Path], boxes: Mapping[str, BoxEntry] | None = None, masks: Mapping[str, Path] | None = None
    ) -> Iterator[Prediction]:
        """Classify files in batches; an unreadable one becomes a Prediction with `failure`, the others go on.

        Args:
            paths: image files.
            boxes: entries by `str(path)`, see `BoxTable.join`.
            masks: mask files by `str(path)`; without an entry in `boxes`, the mask's tight box is the box.
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
                yield from merged(done, self._predict(batch))
                batch, done = [], []
        yield from merged(done, self._predict(batch) if batch else [])

    def _load(self, path: Path, entry: BoxEntry | None, mask_file: Path | None) -> Item:
        image = load_image(path, fill=self.model.view_spec.fill)
        size = (image.height, image.width)
        mask = load_mask(mask_file, size) if mask_file else None
        if entry is not None:
            return Item(str(path), image, entry.detections(size, str(path)), entry.failure, mask)
        return Item(str(path), image, None if mask is None else Detections.from_mask(mask), None, mask)

    @torch.inference_mode()
    def _predict(self, items: Sequence[Item]) -> list[Prediction]:
        if self.localizer is not None:
            lacking = [i for i, item in enumerate(items) if item.boxes is None and item.localizer_failure is None]
            if self.topk_prompts is not None and len(lacking) == len(items):
                return checked(self._ask(items))
            found = dict(zip(lacking, self._localize([items[i] for i in lacking]))) if lacking else {}
            items = [found.get(i, item) for i, item in enumerate(items)]
        return checked(self._classify(items))

    def _localize(self, items: Sequence[Item]) -> list[Item]:
        """The items with what the localizer found; where it fails on a batch, each image is tried alone."""
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

    def _ask(self, items: Sequence[Item]) -> list[Prediction]:
        """Predictions by `topk_prompts`; where none of an image's classes is found, the full branch answers."""
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
            output, has_fg = self._look(items, part)
            for row, answer in zip(part, self._answers(output, part, has_fg)):
                answers[row.item].append(answer)
        if isinstance(self.model.fusion, ObjectnessMaxConfidence):  # the box that answers for the image comes first
            answers = [sorted(objects, key=product, reverse=True) for objects in answers]
        return [Prediction(item.name, tuple(objects)) for item, objects in zip(items, answers)]

    def _look(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[L2R2Output, list[bool]]:
        """What the model says of the rows, and in which of them it saw an object."""
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
        """The boxes to classify, or None and why there are none (`docs/method.md`, section 2)."""
        detections = item.boxes
        if self.model.finds_object:
            return None, "the network found no part of an object"  # it looks for itself; boxes are not used
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

    def _answers(self, output: L2R2Output, rows: Sequence[Row], has_fg: Sequence[bool]) -> Iterator[ObjectPrediction]:
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
                box=tuple(round(v, 2) for v in box.tolist()) if has_fg[i] and box.isfinite().all() else None,
                box_score=None if box_score is None else round(box_score, 4),
                top=tuple(said["fused"]),
                logits={b: [round(v, DIGITS) for v in z[i].tolist()] for b, z in output.branches().items()} if keep else None,
            )

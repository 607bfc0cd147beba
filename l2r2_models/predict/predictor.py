"""Predictor: from images and boxes to predictions, through views, branches and fusion."""

from __future__ import annotations

import copy
from collections import deque
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
from ..images import ImageSource, LazyImage, load_image, load_mask
from ..localize import NONE, Localizer, create_localizer
from ..pipe import in_order, worker_count
from ..views import decode_patches, takes_patches
from .adapt import Adapter
from .answers import answers_of
from .classify import Answered, Network, Precision
from .finite import checked
from .items import Item, Job, Pending, Row, images_of, is_large, pixels_of, whole_images
from .locate import lacks_boxes, localized, located
from .prediction import LOCALIZER_FAILED, NO_BOX, ObjectPrediction, Prediction, checked_rule, product
from .rule_files import cascade_of
from .rules import Rules

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
        workers: number of threads that decode files in advance; 0 for none, by default one per core.
        precision: precision of the network, `fp32`, or the faster and less precise `bf16`, if the hardware supports it.
        cascade: run the fg branch first, and the others only where it does not decide: with 0, where they could change the fused
            prediction; with the percentage points of `l2r2 fuse --cascade`, where fg is below the confidence fitted for that
            loss of accuracy. `ObjectPrediction.full` is None where it was not needed; by default, all branches run.
        image_rule: how the prediction for an image follows from those for its objects: `best`, `weighted` or `full`, see
            `image_answer`.
        cuda_graphs: on a GPU, replay the ViT of an fg branch that drops tokens as CUDA graphs, see `PackedGraphs`. Faster where
            the host is the bottleneck; experimental, not yet run on a GPU. Without one, predictions and speed stay the same.

    Raises:
        L2R2Error: when the model does not take RGB images, a number is out of range, the localizer cannot be created or does
            not fit the model, the hardware does not support the precision, the model lacks a branch for the cascade or the
            image rule, or it drops no tokens and `cuda_graphs` is set.
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
        workers: int | None = None,
        precision: Precision = "fp32",
        cascade: float | None = None,
        image_rule: str = "best",
        cuda_graphs: bool = False,
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
        if localizer == NONE:
            localizer = None
        elif isinstance(localizer, str):
            localizer = create_localizer(localizer, device=self.device, checkpoint=checkpoint)
        self.localizer: Localizer | None = localizer
        self.topk_prompts = topk_prompts
        self.network = Network(self.model, self.device, batch_size, precision, cascade_of(checkpoint, cascade), cuda_graphs)
        self.workers = worker_count(workers)
        self.keep_logits, self.rules = False, Rules(self.labels)
        self.image_rule = checked_rule(image_rule, self.model.branches, cascade is not None)
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
            return next(self.predict_items([self._given(image, boxes)]))
        if boxes is not None and len(boxes) != len(image):
            raise L2R2Error(f"{len(boxes)} entries of boxes for {len(image)} images; pass one per image (None for no boxes).")
        return list(self.predict_items(self._given(*pair) for pair in zip(image, boxes or [None] * len(image))))

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
        """Return a copy of the predictor that also keeps the logits of the branches.

        Raises:
            L2R2Error: when `topk_prompts` or `cascade` is set.
        """
        if option := "topk_prompts" if self.topk_prompts is not None else "cascade" if self.network.cascade is not None else "":
            raise L2R2Error(f"Predictions with {option} do not have the logits of every branch; predict without {option}.")
        keeping = copy.copy(self)
        keeping.keep_logits, keeping.network = True, copy.copy(self.network)
        keeping.network.round_logits = True
        return keeping

    def with_rules(self, rules: Rules) -> Predictor:
        """Return a copy of the predictor that names classes by these rules.

        Raises:
            L2R2Error: when `topk_prompts`, or an image rule or cascade that does not follow them, is set, or when they have both
                a prior and a threshold to abstain.
        """
        if rules.abstain is not None and self.network.cascade is not None and self.network.cascade.loss:
            raise L2R2Error("The risk of --abstain was fitted on fused predictions; leave out --cascade, or use --cascade 0.")
        if rules and self.topk_prompts is not None:
            raise L2R2Error("topk_prompts has its own way to choose a class, so it cannot be restricted, rolled up or corrected.")
        if rules.prior is not None and rules.abstain is not None:
            raise L2R2Error("The risk of --abstain was fitted without --prior and does not hold with it; use one or the other.")
        if self.image_rule != "best" and (rules.rollup is not None or rules.abstain is not None or rules.prior is not None):
            raise L2R2Error(f'The image rule "{self.image_rule}" names a class; with a rollup, a prior or abstaining, use best.')
        ruled = copy.copy(self)
        ruled.rules = rules
        return ruled

    def adapter(self, noun: str) -> Adapter:
        """Return an `Adapter` that fuses the predictions of a group (named `noun` in messages) jointly.

        Raises:
            L2R2Error: when the fusion has no batch rule.
        """
        return Adapter(copy.deepcopy(self.model.fusion).cpu().float(), self.rules, self.top, noun, self.image_rule)

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
            item = localized(self, [item])[0]
        found = self._usable(item)[0]
        if found is not None and found.masks is None and mask is not None:
            found = replace(found, masks=mask.expand(len(found), -1, -1))
        (whole,) = whole_images([item])
        return whole, found, next(self._classify([item]))

    def _given(self, image: ImageSource, boxes: Boxes | None) -> Item:
        name = str(image) if isinstance(image, (str, Path)) else None
        loaded = load_image(image, fill=self.model.view_spec.fill)
        size = (loaded.height, loaded.width)
        if boxes is not None and not isinstance(boxes, Detections):
            boxes = Detections.from_lists(boxes, size)
        if boxes is not None and boxes.image_size != size:
            raise L2R2Error(f"{name or 'image'}: boxes for a {boxes.image_size} image (height, width), but it is {size}.")
        return Item(name, loaded, boxes, size=size)

    def predict_files(
        self, paths: Iterable[Path], boxes: Mapping[str, BoxEntry] | None = None, masks: Mapping[str, Path] | None = None
    ) -> Iterator[Prediction]:
        """Classify files in batches; an unreadable file becomes a Prediction with `failure`.

        Args:
            paths: image files.
            boxes: entries by `str(path)`, see `BoxTable.join`.
            masks: mask files by `str(path)`; without an entry in `boxes`, the tight box around the mask is used.
        """
        known, mask_files = boxes or {}, masks or {}
        given = ((path, known.get(str(path)), mask_files.get(str(path))) for path in paths)
        ahead = self.network.most
        return self.predict_items(in_order(lambda one: self.load_file(*one), given, self.workers, ahead=ahead, weigh=pixels_of))

    def load_file(
        self, path: str | Path, entry: BoxEntry | None = None, mask_file: Path | None = None, data: bytes | None = None
    ) -> Item | Prediction:
        """Decode a file, or its content `data`, for `predict_items`; one that cannot be used is a failed prediction."""
        try:
            return self._cut(self.decode(path, entry, mask_file, data))
        except L2R2Error as error:
            return Prediction(str(path), (), str(error))

    def load(self, image: LazyImage, boxes: Detections | None = None) -> Item:
        """Decode an image as `predict_files` does, for `predict_items`; several threads can do so at the same time.

        Args:
            image: created with the `fill` of the model's ViewSpec.
            boxes: its boxes; None for the localizer.

        Raises:
            ImageError: when the image cannot be decoded.
        """
        return self._cut(self._decoded(image, Item(image.name, None, boxes, size=image.size)))

    def decode(
        self, path: str | Path, entry: BoxEntry | None = None, mask_file: Path | None = None, data: bytes | None = None
    ) -> Item:
        """Decode what the views show, and select the boxes to classify; before the localizer runs, the whole image."""
        image = LazyImage(path if data is None else data, fill=self.model.view_spec.fill, name=str(path))
        mask = load_mask(mask_file, image.size) if mask_file else None
        boxes = None if mask is None else Detections.from_mask(mask)
        if entry is not None:
            boxes = entry.detections(image.size, str(path))
        return self._decoded(image, Item(str(path), None, boxes, entry.failure if entry else None, mask, size=image.size))

    def _decoded(self, image: LazyImage, item: Item) -> Item:
        if lacks_boxes(self, item):
            return replace(item, image=image.load())
        spec, branches, rows = self.model.view_spec, self.model.branches, self.rows_of(item)
        where = torch.stack([row.box for row in rows])
        pixels = decode_patches(image, where, spec, branches) if takes_patches(spec, branches) else image.load()
        return replace(item, image=pixels, rows=rows)

    def _cut(self, item: Item) -> Item:
        """On a CPU, cut the views, so that this happens in the thread that decodes."""
        return self.network.cut(item, item.rows) if self.device.type == "cpu" and item.rows else item

    @torch.inference_mode()
    def predict_items(self, items: Iterable[Item | Prediction]) -> Iterator[Prediction]:
        """Classify items of `load`, in batches, and yield predictions in their order; failed predictions are passed on."""
        yield from self._classify(items if self.localizer is None else located(self, items))

    def _classify(self, items: Iterable[Item | Prediction]) -> Iterator[Prediction]:
        """Yield predictions in the order of the items; batches are filled with the boxes of several images."""
        waiting: deque[Pending | Prediction] = deque()
        jobs: list[Job] = []
        for item in items:
            if isinstance(item, Item):
                pending = Pending(item, self.rows_of(item) if item.rows is None else item.rows)
                jobs += [Job(pending, number) for number in range(len(pending.rows))]
                waiting.append(pending)
            else:
                waiting.append(item)
            while len(jobs) >= self.network.most or is_large(pending.item for pending in images_of(jobs)):
                self._answer(jobs[: self.network.most])
                jobs = jobs[self.network.most :]
            yield from self._completed(waiting)
        for start in range(0, len(jobs), self.network.most):
            self._answer(jobs[start : start + self.network.most])
        yield from self._completed(waiting)

    def _completed(self, waiting: deque[Pending | Prediction]) -> Iterator[Prediction]:
        """Remove and yield the completed predictions at the front."""
        while waiting:
            first = waiting[0]
            if isinstance(first, Pending):
                if (objects := first.objects) is None:
                    return
                if isinstance(self.model.fusion, ObjectnessMaxConfidence):  # the box that decides the image's label comes first
                    objects = tuple(sorted(objects, key=product, reverse=True))
                first = checked([Prediction(first.item.name, objects, size=first.item.size, rule=self.image_rule)])[0]
            waiting.popleft()
            yield first

    def _answer(self, jobs: Sequence[Job]) -> None:
        for job, answer in zip(jobs, self.answers(self.network(jobs), jobs)):
            job.pending.answers[job.number] = answer

    def rows_of(self, item: Item) -> list[Row]:
        """Return the boxes of an image to classify, or one row without a box."""
        usable, why = self._usable(item)
        if usable is None:
            return [Row(torch.full((4,), float("nan")), None, why, item.mask)]
        masks = usable.masks if usable.masks is not None else [item.mask] * len(usable)
        found = zip(usable.boxes, usable.scores.tolist(), masks, usable.labels)
        return [Row(box, score, "", mask, label) for box, score, mask, label in found]

    def _usable(self, item: Item) -> tuple[Detections | None, str]:
        """Return the boxes to classify, or None and the reason why there are none (`docs/method.md`, section 2)."""
        detections = item.boxes
        if self.model.finds_object:
            return None, "the network found no part of an object"  # it finds the object itself; boxes are not used
        if item.localizer_failure is not None:
            return None, f"{LOCALIZER_FAILED} ({item.localizer_failure})"
        if detections is None or not len(detections):
            return None, NO_BOX if detections is None else "no object was found"
        sure = detections.above(self.box_threshold)
        if not len(sure):
            return None, f"no box reaches the score {self.box_threshold:g} (best {detections.scores.max():.2f})"
        usable = sure.usable()
        if not len(usable):
            return None, "every box is empty or outside of the image"
        best = usable.sorted()
        return best if len(best) <= self.max_objects else best.select(torch.arange(self.max_objects)), ""

    def answers(self, answered: Answered, jobs: Sequence[Job]) -> Iterator[ObjectPrediction]:
        """Yield the prediction for each box."""
        return answers_of(answered, jobs, self.rules, self.top, over=self.model.fusion.over, keep_logits=self.keep_logits)

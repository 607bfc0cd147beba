"""Explanations of predictions: what each branch sees, saliency maps, and counterfactuals."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..audit.classifier import Audited
from ..audit.perturbations import Subject, number_of
from ..audit.samples import shrunk
from ..boxes.detections import Detections
from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..errors import L2R2Error
from ..images import ImageSource, image_tensor, load_image, load_mask
from ..localize import Localizer
from ..predict.prediction import ObjectPrediction, Prediction
from ..predict.predictor import Boxes, Predictor
from ..predict.rules import Rules
from ..views import Views, make_views, view_map
from .counterfactuals import Counterfactual, counterfactuals, probability_of
from .measures import against_mask, insertion_deletion
from .objects import given_boxes, inside_of, on_small, subject_of
from .saliency import METHODS, Question, branch_input, default_method, on_image, saliency

if TYPE_CHECKING:
    from ..predict.inputs import Inputs

RUNNER_UP = "runner-up"
TRIES = 5  # images tried for a background before the swap is skipped


@dataclass(frozen=True)
class Explanation:
    """Explanation of the prediction for one image.

    Maps and pixels of large images are downscaled to 2 megapixels; the views are cut from the original image.

    Attributes:
        file: name of the image, or None.
        prediction: the explained prediction, as `Predictor` returns it.
        truth: true label, or None.
        method: saliency method.
        questions: what each map explains, by output: "why A", or "why A and not B".
        pixels: uint8 `[H, W, 3]`.
        box: xyxy in these pixels; None without an object.
        inside: `[H, W]` bool, the object's mask or box; None without an object.
        views: uint8 `[S, S, 3]` by branch, the network's inputs.
        own: `[h, w]` map of each branch over its own view.
        maps: `[H, W]` map on the image by output (`full`, `fg`, `bg`, `fused`).
        measures: metrics of the maps by output, see `measures.against_mask` and `measures.insertion_deletion`.
        changes: counterfactuals, the unchanged image first.
        disagreement: total variation distance between the probabilities of full and fg, 0 to 1; None without both.
    """

    file: str | None
    prediction: ObjectPrediction
    truth: str | None
    method: str
    questions: dict[str, str]
    pixels: Tensor
    box: Tensor | None
    inside: Tensor | None
    views: dict[str, Tensor]
    own: dict[str, Tensor]
    maps: dict[str, Tensor]
    measures: dict[str, dict[str, float]]
    changes: list[Counterfactual]
    disagreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without images and maps."""
        plain = Prediction(self.file, (self.prediction,)).to_dict()
        return {
            **plain,
            "truth": self.truth,
            "method": self.method,
            "questions": self.questions,
            "measures": self.measures,
            "changes": {c.name: c.probability for c in self.changes},
            "disagreement": self.disagreement,
        }

    @property
    def answer(self) -> str:
        """Name of the model's own output: `fused`, or its only branch."""
        return list(self.maps)[-1]

    @property
    def outside(self) -> float | None:
        """Fraction of the saliency of the model's own output that is outside the object; None without an object or saliency."""
        share = self.measures[self.answer].get("share")
        return None if share is None else 1 - share

    @property
    def error(self) -> float | None:
        """How wrong the prediction is: 1 - score if it is correct, else 1 + score; None without a true label."""
        if self.truth is None:
            return None
        return 1 + self.prediction.score * (-1 if self.prediction.label == self.truth else 1)


class Explainer:
    """Explain the predictions of a checkpoint.

    Args:
        checkpoint: see `load_checkpoint`.
        method: `gradcam`, `ig`, `occlusion`, `rollout` (plain ViTs; does not depend on the class), `parts` (iFAM models), or
            `auto`: parts for iFAM models, ig if fg drops tokens, else gradcam.
        target: classes to explain, several count as one; defaults to the class that each output predicts.
        against: class to contrast with ("why A and not B"), or `runner-up` for the second most probable class of the fused
            prediction. Without `target`, the map of every branch is then for the class of the fused prediction.
        numbers: also compute insertion, deletion and counterfactuals, which takes some 60 more forward passes per image.
        box_threshold, localizer, device: see `Predictor`.

    Raises:
        L2R2Error: when the method, a class or the localizer is unknown, the network does not support the method, or captum is
            missing.

    >>> explain = Explainer.from_pretrained("runs/fungi")  # doctest: +SKIP
    >>> explain("photo.jpg", boxes=[[130, 42, 410, 380]]).measures["fg"]["share"]  # doctest: +SKIP
    0.91
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        method: str = "auto",
        target: Sequence[str] = (),
        against: str | None = None,
        numbers: bool = True,
        box_threshold: float | None = None,
        localizer: str | Localizer | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        try:
            import captum  # noqa: F401
            import sklearn  # noqa: F401
        except ImportError as error:
            raise L2R2Error('Explanations need more packages: pip install "l2r2-models[explain]".') from error
        self.predictor = Predictor(checkpoint, box_threshold=box_threshold, localizer=localizer, device=device)
        self.model, self.labels = self.predictor.model, checkpoint.labels
        if method not in ("auto", *METHODS):
            raise L2R2Error(f'Unknown method "{method}"; choose from auto, {", ".join(METHODS)}.')
        self.method = default_method(self.model) if method == "auto" else method
        self.target = tuple(map(self._class, target))
        self.against = None if against in (None, RUNNER_UP) else self._class(str(against))
        self.runner_up = against == RUNNER_UP
        if self.against is not None and self.against in self.target:
            raise L2R2Error(f'"{against}" is both the class to explain and the one to contrast with; choose two.')
        if (self.against is not None or self.runner_up) and self.method == "rollout":
            raise L2R2Error("Attention rollout is the same for every class; for --against, choose gradcam, ig or occlusion.")
        self.numbers = numbers
        names = tuple((label,) for label in self.labels)
        threshold = self.predictor.box_threshold
        self.audited = Audited(checkpoint.name, self.model, names, self.model.view_spec, self.model.branches, threshold)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Explainer:
        """Load an explainer from a run folder or Hub id (`org/name`, `hf-hub:org/name@revision`); options as for `Explainer`."""
        return cls(load_checkpoint(source), **options)

    def with_rules(self, rules: Rules) -> Explainer:
        """Return a copy of the explainer for the predictions that these rules give; a group is explained as its classes.

        Raises:
            L2R2Error: when a class to explain or to contrast with is not possible by the rules.
        """
        wanted = [self.labels[i] for i in (*self.target, *(() if self.against is None else (self.against,)))]
        if excluded := next((label for label in wanted if label not in (rules.classes or self.labels)), None):
            raise L2R2Error(f'The class "{excluded}" is not among the possible ones; choose another class, or allow it.')
        ruled = copy.copy(self)
        ruled.predictor = self.predictor.with_rules(rules)
        return ruled

    def __call__(
        self,
        image: ImageSource,
        boxes: Boxes | None = None,
        *,
        mask: Tensor | None = None,
        truth: str | None = None,
        background: Tensor | None = None,
        name: str | None = None,
    ) -> Explanation:
        """Explain one image.

        Args:
            image, boxes: see `Predictor.__call__`.
            mask: `[H, W]` bool of the object.
            truth: true label.
            background: uint8 `[h, w, 3]` without an object, for the counterfactual with a swapped background.
            name: name of the image in messages and reports; defaults to its path.

        Raises:
            ImageError: when the image cannot be read.
            L2R2Error: when the boxes are for another image size, or the network's output is not finite.
        """
        name = str(image) if name is None and isinstance(image, (str, Path)) else name
        picture, found, prediction = self.predictor.look_at(image, boxes, mask, name)
        predicted = prediction.failure or prediction.objects[0]
        if isinstance(predicted, str):
            raise L2R2Error(predicted)
        pixels = image_tensor(picture)
        if found is None and self.model.finds_object and (boxes is not None or mask is not None):
            # the network does not use them, but its maps are compared with them
            found = given_boxes(boxes, mask, (pixels.shape[0], pixels.shape[1]))
        subject = subject_of(name or "image", pixels, found, predicted)
        return self._explain(name, predicted, truth, pixels, subject, background)

    def _explain(
        self,
        name: str | None,
        predicted: ObjectPrediction,
        truth: str | None,
        pixels: Tensor,
        subject: Subject | None,
        background: Tensor | None,
    ) -> Explanation:
        box = torch.full((4,), torch.nan) if subject is None else subject.boxes[0]
        mask = None if subject is None else subject.view_mask
        model, device, spec = self.model, self.predictor.device, self.model.view_spec
        views = make_views([pixels], box[None], spec, branches=model.branches, masks=[mask], device=device)
        score = torch.tensor([1.0 if predicted.box_score is None else predicted.box_score], device=device)
        with torch.no_grad():
            out = model.forward_views(**views.inputs(), objectness=score)
        has_fg = bool(out.has_fg)
        logits = {b: z for b, z in out.branches().items() if has_fg or b == "full"} or out.branches()
        logits = self._ruled({**logits, **({"fused": out.fused} if len(model.branches) > 1 else {})}, name)
        audited = replace(self.audited, rules=lambda found: self._ruled(found, name))
        questions = {answer: self._question(answer, logits, predicted) for answer in logits}
        size = (pixels.shape[0], pixels.shape[1])
        where = {b: view_map(b, spec, size, box if has_fg else None) for b in model.branches}
        small = on_small(subject, name or "image", pixels)
        maps: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        for answer, question in questions.items():
            found = saliency(model, views, answer, question, self.method, score)
            own |= {answer: found[answer]} if answer in found else {}
            drawn = on_image(found, where, size)
            maps[answer] = _resized(drawn, small.pixels.shape)
        inside = None if subject is None else inside_of(small)
        measures = {a: {} if inside is None else against_mask(m, inside) for a, m in maps.items()}
        changes: list[Counterfactual] = []
        if self.numbers:
            for answer in (a for a in maps if a in (*audited.answers, "fused")):
                of = probability_of(audited, answer, small.boxes[0], small.view_mask, questions[answer])
                measures[answer] |= insertion_deletion(maps[answer], small.pixels, spec.fill, of)
            if subject is not None and not small.inside.all():
                changes = counterfactuals(audited, small, list(questions.values())[-1], spec.fill, background)
        return Explanation(
            name,
            predicted,
            truth,
            self.method,
            {a: self._words(q) for a, q in questions.items()},
            small.pixels,
            None if subject is None else small.boxes[0],
            inside,
            self._network_inputs(views, logits),
            own,
            maps,
            measures,
            changes,
            _distance(logits),
        )

    def _ruled(self, logits: dict[str, Tensor], name: str | None) -> dict[str, Tensor]:
        """Apply the rules to logits `[B, classes]` of one image by output; what a prior corrects is always called `fused`."""
        rules, last = self.predictor.rules, list(logits.values())[-1]
        given = logits if rules.prior is None else {**logits, "fused": last}
        return rules.applied(given, [name] * len(last))

    def explain_files(
        self, inputs: Inputs, *, seed: int = 0, paths: Sequence[Path] | None = None
    ) -> Iterator[Explanation | L2R2Error]:
        """Explain files one by one; for an image that cannot be used, the error is yielded instead.

        Args:
            inputs: see `predict.predict_files.gather`.
            seed: random seed of the swapped backgrounds.
            paths: the images to explain; by default all. Backgrounds come from all images.
        """
        for path in inputs.paths if paths is None else paths:
            try:
                image, boxes, mask = self._load(path, inputs)
                background = self._background(path, inputs, seed) if self.numbers else None
                truth = inputs.labels.get(str(path))
                yield self(image, boxes, mask=mask, truth=truth, background=background, name=str(path))
            except L2R2Error as error:
                yield error

    def _load(self, path: Path, inputs: Inputs) -> tuple[Any, Detections | None, Tensor | None]:
        image = load_image(path, fill=self.model.view_spec.fill)
        size, name = (image.height, image.width), str(path)
        mask = load_mask(inputs.masks[name], size) if name in inputs.masks else None
        if (entry := inputs.entries.get(name)) is not None:
            return image, entry.detections(size, name), mask
        return image, None if mask is None else Detections.from_mask(mask), mask

    def _background(self, path: Path, inputs: Inputs, seed: int) -> Tensor | None:
        """Return the background of another image with a known object, of another class if labels are known."""
        label = inputs.labels.get(str(path))
        others = [p for p in inputs.paths if p != path and (str(p) in inputs.entries or str(p) in inputs.masks)]
        others = [p for p in others if label is None or inputs.labels.get(str(p)) != label] or others
        others.sort(key=lambda p: number_of(seed, str(path), str(p)))
        for other in others[:TRIES]:
            try:
                image, boxes, mask = self._load(other, inputs)
            except L2R2Error:
                continue
            usable = None if boxes is None else boxes.above(self.predictor.box_threshold).usable()
            if usable is not None and len(usable):
                whole = mask if usable.masks is None else usable.masks.any(0)
                donor = shrunk(Subject(str(other), image_tensor(image), usable.boxes, whole, None))
                return None if donor.inside.all() else donor.background
        return None

    def _question(self, answer: str, logits: Mapping[str, Tensor], predicted: ObjectPrediction) -> Question:
        last = list(logits)[-1]  # the model's own output
        of = last if self.runner_up or self.against is not None else answer
        target = self.target or (int(logits[of][0].argmax()),)
        if not self.target and of == last and predicted.source == "rollup":
            rules = self.predictor.rules
            possible = self.labels if rules.classes is None else rules.classes
            of_group = (label in possible and predicted.label in rules.ancestors.get(label, ()) for label in self.labels)
            target = tuple(i for i, inside in enumerate(of_group) if inside)
        if self.runner_up:
            rest = logits[last][0].clone()
            rest[list(target)] = -torch.inf
            return Question(target, (int(rest.argmax()),) if rest.isfinite().any() else ())
        return Question(target, () if self.against is None or self.against in target else (self.against,))

    def _words(self, question: Question) -> str:
        target, against = (" or ".join(self.labels[i] for i in group) for group in (question.target, question.against))
        return f"why {target} and not {against}" if against else f"why {target}"

    def _network_inputs(self, views: Views, answers: dict[str, Tensor]) -> dict[str, Tensor]:
        spec, shown = self.model.view_spec, {}
        for branch in (b for b in self.model.branches if b in answers):
            given = branch_input(self.model, branch, views)
            pixels = spec.to_uint8(given.view[0].cpu())
            if given.mask is not None:
                pixels = (pixels * (0.25 + 0.75 * given.mask[0].cpu())).round().byte()
            shown[branch] = pixels.permute(1, 2, 0)
        return shown

    def _class(self, label: str) -> int:
        if label not in self.labels:
            raise L2R2Error(
                f'The model has no class "{label}"; it has {", ".join(self.labels[:8])}{", ..." * (len(self.labels) > 8)}.'
            )
        return self.labels.index(label)


def _resized(values: Tensor, shape: torch.Size) -> Tensor:
    if values.shape == shape[:2]:
        return values
    return torch.nn.functional.interpolate(values[None, None], (shape[0], shape[1]), mode="area")[0, 0]


def _distance(logits: dict[str, Tensor]) -> float | None:
    if not {"full", "fg"} <= set(logits):
        return None
    full, fg = (logits[b][0].float().softmax(0) for b in ("full", "fg"))
    return float((full - fg).abs().sum() / 2)

"""Florence-2 by prompt: a language model that writes the boxes of an image as text, through transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor

from ..boxes.detections import Detections
from ..errors import L2R2Error
from .base import Context, LocalizerSpec
from .prompted import COMMON, TextFused

TASK = "<OPEN_VOCABULARY_DETECTION>"  # "Locate {prompt} in the image."
BEAMS, LONGEST = 3, 1024  # of the published examples; a box takes five tokens or more


class Florence2(TextFused):
    """Florence-2 (Xiao et al. 2024), with its task of open-vocabulary detection; each prompt is a request of its own.

    The model writes boxes as text and gives no scores, and a box that it writes is one that it found. So each has score 1, and
    they stay in the order in which they were written; of a polygon, the box around it is taken.

    Options: those of `Prompted`, without `threshold`.
    """

    name = "florence2"
    model_types = ("florence2",)
    auto_classes = ("Florence2ForConditionalGeneration", "AutoProcessor")
    known_options: ClassVar = {key: option for key, option in COMMON.items() if key != "threshold"}

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self._check(self.options["prompt"])

    def _pass(self, images: list[Image], queries: Sequence[tuple[str, ...]]) -> list[Detections]:
        self._check({prompt for query in queries for prompt in query})
        asked = [(i, prompt) for i, query in enumerate(queries) for prompt in query]
        boxes: list[list[list[float]]] = [[] for _ in images]
        labels: list[list[str]] = [[] for _ in images]
        for start in range(0, len(asked), len(images)):  # no larger than the caller's batch
            part = asked[start : start + len(images)]
            written = self._generate([images[i] for i, _ in part], [prompt for _, prompt in part])
            for (i, prompt), tokens in zip(part, written):
                found = self._boxes_of(tokens, images[i])
                boxes[i] += found
                labels[i] += [prompt] * len(found)
        each = zip(boxes, labels, images)
        return [self.tidy(torch.tensor(b).reshape(-1, 4), torch.ones(len(b)), image, names) for b, names, image in each]

    def _generate(self, images: list[Image], prompts: list[str]) -> Tensor:
        """The tokens that the model writes for each image and its prompt, `[B, T]`."""
        model = self.network.model
        text = [TASK + prompt for prompt in prompts]
        inputs = self.network.processor(images=images, text=text, padding=True, return_tensors="pt").to(self.context.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        limit = min(LONGEST, model.config.text_config.max_position_embeddings - 1)
        tokens: Tensor = model.generate(
            **inputs, do_sample=False, num_beams=BEAMS, max_new_tokens=limit, logits_processor=[_refuse_nan]
        )
        return tokens

    def _boxes_of(self, tokens: Tensor, image: Image) -> list[list[float]]:
        """The boxes that the tokens of one image stand for, in its pixels."""
        found = self.network.processor.post_process_generation(sequence=tokens.tolist(), task=TASK, image_size=image.size)[TASK]
        boxes: list[list[float]] = found["bboxes"]
        return boxes + [_around(polygons) for polygons in found["polygons"]]

    def _check(self, prompts: Iterable[str]) -> None:
        """Refuse prompts that the model would read as something else, or cannot read in full."""
        processor, longest = self.network.processor, self.network.model.config.text_config.max_position_embeddings
        for prompt in prompts:
            if "<" in prompt:
                raise L2R2Error(f'The prompt "{prompt}" has a "<", which starts a command of Florence-2; leave it out.')
            request = processor.task_prompts_with_input[TASK].format(input=prompt)
            count = processor.num_image_tokens + len(processor.tokenizer(request)["input_ids"])
            if count > longest:
                raise L2R2Error(
                    f'The prompt "{prompt[:80]}" is too long for {self.name} ({count} tokens of {longest}); shorten it.'
                )


def _refuse_nan(tokens: Tensor, scores: Tensor) -> Tensor:
    """Stop a generation that has become NaN, which would end as an image without boxes."""
    if bool(scores.isnan().any()):
        raise L2R2Error("all scores of the localizer are NaN; try dtype=float32, or check its weights.")
    return scores


def _around(polygons: Any) -> list[float]:
    """The box around the polygons of an object, lists of x, y, x, y, ..."""
    points = torch.cat([torch.tensor(polygon).reshape(-1, 2) for polygon in polygons])
    return [*points.amin(0).tolist(), *points.amax(0).tolist()]

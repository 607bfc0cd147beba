"""Open-vocabulary detectors: OWLv2, (MM-)Grounding DINO and OmDet-Turbo, through transformers.

The source is a Hub id or a local folder with safetensors weights. One prompt, or several: OWLv2 averages their normalized text
embeddings and normalizes the mean (L2R2, appendix B.2); Grounding DINO fuses text early, so there several prompts are one text
"a. b."; OmDet-Turbo takes them as classes. See `docs/method.md`, section 6.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.ops import box_convert

from ..boxes.detections import Detections
from ..errors import L2R2Error
from .base import Context, LocalizerSpec, Option, number, one_of
from .network import LIMITS, PART, NetworkLocalizer

COMMON = {"prompt": Option(str.strip, (), "words", many=True), **LIMITS}


def _is_empty(prompt: str) -> bool:
    """Whether a prompt holds nothing but spaces and full stops, which separate the prompts of Grounding DINO."""
    return not prompt.strip(" .")


class Prompted(NetworkLocalizer):
    """Base class of the prompted detectors, which checks their prompts.

    Options: those of `NetworkLocalizer`, and `prompt` (may be given several times).
    """

    known_options: ClassVar = COMMON
    prompted = True
    auto_classes = ("AutoModelForZeroShotObjectDetection", "AutoProcessor")

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        if any(map(_is_empty, self.options["prompt"])):
            raise L2R2Error(f'The localizer "{spec}" has an empty prompt; give a word such as prompt=mushroom.')
        self.load()

    @property
    def lacks_prompt(self) -> bool:
        """Whether the spec has no prompt."""
        return not self.options["prompt"]

    def find(self, images: list[Image], names: Any, prompts: Sequence[str] | None) -> list[Detections]:
        """Search each image for the spec's prompts together, or for its own prompt."""
        if prompts is None:
            self.check_prompt()
        elif any(map(_is_empty, prompts)):
            raise L2R2Error(f"The localizer {self.name} got an empty prompt for an image.")
        queries = [self.options["prompt"]] * len(images) if prompts is None else [(prompt.strip(),) for prompt in prompts]
        return [found for (found,) in self.search(images, [[query] for query in queries])]

    def by_prompt(self, images: Sequence[Image], prompts: Sequence[Sequence[str]]) -> list[list[Detections]]:
        """Search for each prompt of an image separately; the image is encoded only once if the network allows it.

        Args:
            images: B images.
            prompts: for each image, the same number of prompts.

        Returns:
            For each image, one `Detections` per prompt.
        """
        return self.search(list(images), [[(prompt,) for prompt in of_image] for of_image in prompts])

    @abstractmethod
    def search(self, images: list[Image], queries: list[list[tuple[str, ...]]]) -> list[list[Detections]]:
        """Search each image for each of its queries; a query is one or more prompts that are searched for together."""


class Owlv2(Prompted):
    """OWLv2 (Minderer et al. 2023).

    Each text is encoded once, and each image once, however many queries it has.

    Options: those of `Prompted`; `score=objectness` uses the network's class-agnostic score and takes no prompt.
    """

    name = "owlv2"
    model_types = ("owlv2",)
    known_options: ClassVar = {
        **COMMON,
        "score": Option(one_of("prompt", "objectness"), "prompt", "prompt or objectness"),
    }

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self.texts: dict[str, Tensor] = {}
        if self.options["score"] == "objectness" and self.options["prompt"]:
            raise L2R2Error(f'The localizer "{spec}" scores by objectness, which ignores the prompt; use one or the other.')

    @property
    def lacks_prompt(self) -> bool:
        """Whether scoring by prompt lacks a prompt."""
        return self.options["score"] == "prompt" and super().lacks_prompt

    def find(self, images: list[Image], names: Any, prompts: Sequence[str] | None) -> list[Detections]:
        """Search by prompt, or for anything with a high objectness."""
        if self.options["score"] == "prompt":
            return super().find(images, names, prompts)
        return [found for (found,) in self.search(images, [[]] * len(images))]

    @torch.inference_mode()
    def search(self, images: list[Image], queries: list[list[tuple[str, ...]]]) -> list[list[Detections]]:
        """Detect on one encoding of each image; queries are `[B][Q]`, none with `score=objectness`."""
        model = self.network.model
        pixels = self.network.processor(images=images, return_tensors="pt")["pixel_values"]
        grid, _ = model.image_embedder(pixels.to(self.context.device, model.dtype))  # [B, h, w, D]
        features = grid.flatten(1, 2)
        boxes = box_convert(model.box_predictor(features, grid).float(), "cxcywh", "xyxy").cpu()  # of the padded square
        if queries[0]:
            wanted = torch.stack([torch.stack([self.embed(query) for query in of_image]) for of_image in queries])  # [B, Q, D]
            logits, _ = model.class_predictor(features, wanted.to(features))  # [B, P, Q]
        else:
            logits = model.objectness_predictor(features)[..., None]
        scores = logits.float().sigmoid().cpu()
        found = []
        for i, image in enumerate(images):
            pixel_boxes = boxes[i] * max(image.size)
            labels = [query[0] if len(query) == 1 else "" for query in queries[i]] or [""]
            each = [self.tidy(pixel_boxes, scores[i, :, j], image, [label] * len(boxes[i])) for j, label in enumerate(labels)]
            found.append(each)
        return found

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Embed one query as `[D]`: the normalized mean of its prompts' normalized text embeddings."""
        for prompt in (p for p in prompts if p not in self.texts):
            tokens = self.network.processor.tokenizer([prompt], padding="max_length", return_tensors="pt")
            longest = self.network.model.config.text_config.max_position_embeddings
            if tokens["input_ids"].shape[1] > longest:
                count = tokens["input_ids"].shape[1]
                raise L2R2Error(f'The prompt "{prompt}" has {count} tokens; OWLv2 takes at most {longest}, so shorten it.')
            encoded = self.network.model.owlv2.get_text_features(**tokens.to(self.context.device))
            self.texts[prompt] = normalize(encoded.pooler_output[0].float(), dim=-1)
        return normalize(torch.stack([self.texts[p] for p in prompts]).mean(0), dim=-1)


class TextFused(Prompted):
    """Base class of detectors that fuse text and image features early, so that each query takes its own forward pass.

    Only images of the same size share a batch, because padding would change the predictions for the smaller ones.
    """

    @torch.inference_mode()
    def search(self, images: list[Image], queries: list[list[tuple[str, ...]]]) -> list[list[Detections]]:
        """Detect with one forward pass per query and image, batched by image size."""
        found: dict[tuple[int, int], Detections] = {}
        by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, of_image in enumerate(queries):
            by_size.setdefault(images[i].size, []).extend((i, j) for j in range(len(of_image)))
        for same in by_size.values():
            for start in range(0, len(same), len(images)):  # no larger than the caller's batch
                part = same[start : start + len(images)]
                of_part = [queries[i][j] for i, j in part]
                found.update(zip(part, self._pass([images[i] for i, _ in part], of_part)))
        return [[found[i, j] for j in range(len(of_image))] for i, of_image in enumerate(queries)]

    @abstractmethod
    def _pass(self, images: list[Image], queries: Sequence[tuple[str, ...]]) -> list[Detections]:
        """Search each image for its query."""


class GroundingDino(TextFused):
    """Grounding DINO (Liu et al. 2023) and MM-Grounding-DINO (Zhao et al. 2024)."""

    name = "grounding-dino"
    model_types = ("grounding-dino", "mm-grounding-dino")
    known_options: ClassVar = {**COMMON, "threshold": Option(number(0, 1), 0.25, PART)}

    def _pass(self, images: list[Image], queries: Sequence[tuple[str, ...]]) -> list[Detections]:
        model = self.network.model
        text = [". ".join(prompt.lower().rstrip(".") for prompt in query) + "." for query in queries]
        inputs = self.network.processor(images=images, text=text, padding=True, return_tensors="pt").to(self.context.device)
        self._check_length(inputs, text)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model(**inputs)
        boxes = box_convert(out.pred_boxes.float(), "cxcywh", "xyxy").cpu()
        scores = out.logits.float().sigmoid().cpu()  # [B, boxes, tokens]
        found = []
        for i, (image, query) in enumerate(zip(images, queries)):
            labels = _labels(scores[i], inputs["input_ids"][i], self.network.processor.tokenizer, query)
            found.append(self.tidy(boxes[i] * torch.tensor(image.size).repeat(2), scores[i].amax(-1), image, labels))
        return found

    def _check_length(self, inputs: Mapping[str, Tensor], text: Sequence[str]) -> None:
        longest = self.network.model.config.max_text_len
        if inputs["input_ids"].shape[1] > longest:
            raise L2R2Error(
                f'The prompts "{max(text, key=len)[:80]}" have {inputs["input_ids"].shape[1]} tokens; '
                f"{self.name} takes at most {longest}, so shorten them."
            )


class OmDetTurbo(TextFused):
    """OmDet-Turbo (Zhao et al. 2024); each prompt is a class, and the task text is transformers' default, "Detect a, b."."""

    name = "omdet-turbo"
    model_types = ("omdet-turbo",)
    known_options: ClassVar = {**COMMON, "threshold": Option(number(0, 1), 0.3, PART)}

    def _pass(self, images: list[Image], queries: Sequence[tuple[str, ...]]) -> list[Detections]:
        model = self.network.model
        self._check_length(queries)
        inputs = self.network.processor(images=images, text=[list(query) for query in queries], return_tensors="pt")
        inputs = inputs.to(self.context.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model(**inputs)
        boxes = box_convert(out.decoder_coord_logits.float(), "cxcywh", "xyxy").cpu()
        scores = out.decoder_class_logits.float().sigmoid().cpu()  # [B, boxes, most classes of a query]
        found = []
        for image, query, of_image, at in zip(images, queries, scores, boxes):
            best = of_image[:, : len(query)].max(-1)
            labels = [query[j] for j in best.indices.tolist()]
            found.append(self.tidy(at * torch.tensor(image.size).repeat(2), best.values, image, labels))
        return found

    def _check_length(self, queries: Sequence[tuple[str, ...]]) -> None:
        longest = self.network.model.config.text_config.max_position_embeddings  # of the task text, which is cut silently
        for query in set(queries):
            count = len(self.network.processor.tokenizer(f"Detect {', '.join(query)}.")["input_ids"])
            if count > longest:
                raise L2R2Error(
                    f'The prompts "{", ".join(query)[:80]}" have {count} tokens; {self.name} takes at most {longest}, so shorten '
                    f"them or give fewer."
                )


def _labels(scores: Tensor, tokens: Tensor, tokenizer: Any, query: tuple[str, ...]) -> list[str]:
    """For each box, the prompt with the highest token score; "" if the tokens cannot be assigned to prompts.

    Args:
        scores: `[boxes, T]`, with T at least the number of tokens.
        tokens: `[tokens]` ids of "a. b.".
    """
    if len(query) == 1:
        return [query[0]] * len(scores)
    special = set(tokenizer.all_special_ids)
    stop = tokenizer.convert_tokens_to_ids(".")
    spans: list[list[int]] = [[]]
    for position, token in enumerate(tokens.tolist()):
        if token == stop:
            spans.append([])
        elif token not in special:
            spans[-1].append(position)
    spans = [span for span in spans if span]
    if len(spans) != len(query) or not len(scores):
        return [""] * len(scores)
    best = torch.stack([scores[:, span].amax(-1) for span in spans], -1).argmax(-1)
    return [query[j] for j in best.tolist()]

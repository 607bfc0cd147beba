"""SAM 3 by prompt: boxes, masks and scores of everything that a short phrase names, through transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from PIL.Image import Image

from ..boxes.detections import Detections
from ..errors import L2R2Error
from .base import Context, LocalizerSpec, Option, number
from .network import PART
from .prompted import COMMON, Prompted


class Sam3(Prompted):
    """SAM 3 (Carion et al. 2025); each prompt is searched for on its own, in one encoding of the image.

    The score of an object is the product of its own and of that of the prompt's presence in the image. Its mask comes with it, so
    that `masked_crop` and early masking need no other network.

    Options: those of `Prompted`.
    """

    name = "sam3"
    model_types = ("sam3", "sam3_video")  # the published config is of its video model
    auto_classes = ("Sam3Model", "Sam3Processor")
    known_options: ClassVar = {**COMMON, "threshold": Option(number(0, 1), 0.3, PART)}
    gated = True

    def __init__(self, spec: LocalizerSpec, context: Context) -> None:
        super().__init__(spec, context)
        self._check(self.options["prompt"])

    @torch.inference_mode()
    def search(self, images: list[Image], queries: list[list[tuple[str, ...]]]) -> list[list[Detections]]:
        """Encode the images once, then search for one prompt of each at a time; every image has as many queries as the others."""
        model, device = self.network.model, self.context.device
        self._check({prompt for of_image in queries for query in of_image for prompt in query})
        pixels = self.network.processor(images=images, return_tensors="pt")["pixel_values"]
        encoded = model.get_vision_features(pixels.to(device, model.dtype))
        found: list[list[Detections]] = [[] for _ in images]
        for j, query in enumerate(queries[0]):
            outputs = []
            for k in range(len(query)):
                text = self.network.processor(text=[of_image[j][k] for of_image in queries], return_tensors="pt").to(device)
                outputs.append(model(vision_embeds=encoded, **text))
            boxes = torch.cat([out.pred_boxes for out in outputs], 1).float().cpu()  # [B, K * objects, 4]
            scores = torch.cat([out.pred_logits.sigmoid() * out.presence_logits.sigmoid() for out in outputs], 1).float()
            masks = torch.cat([out.pred_masks.sigmoid() for out in outputs], 1).float()  # [B, K * objects, h, w]
            for i, image in enumerate(images):
                labels = [prompt for prompt in queries[i][j] for _ in range(outputs[0].pred_boxes.shape[1])]
                found[i].append(self.tidy(boxes[i] * torch.tensor(image.size).repeat(2), scores[i], image, labels, masks[i]))
        return found

    def _check(self, prompts: Iterable[str]) -> None:
        longest = self.network.model.config.text_config.max_position_embeddings
        for prompt in prompts:
            if (count := len(self.network.processor.tokenizer(prompt)["input_ids"])) > longest:
                raise L2R2Error(
                    f'The prompt "{prompt[:80]}" has {count} tokens; {self.name} takes at most {longest}, so shorten it.'
                )

"""Predict with a vision-language model and class names, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoints.checkpoint import zero_shot_checkpoint
from ..checkpoints.zero_shot import PREFIX, ZeroShotSpec
from ..zero_shot.prompts import TEMPLATE, ClassNames, Prompts
from .predictor import Predictor


class ZeroShotL2R2(Predictor):
    """A `Predictor` on CLIP, SigLIP, SigLIP2 or any model of open_clip: the same model sees the image and the object.

    Source: L2R2, sections 3 and 5.2; see `docs/method.md`, section 10.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str,
        class_names: ClassNames,
        *,
        template: str | Sequence[str] = TEMPLATE,
        fusion: str | Mapping[str, Any] = "max_confidence",
        views: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ZeroShotL2R2:
        """Load a model and compute its class prototypes, or read them from the cache.

        Args:
            source: a folder, or a Hub id (`org/name[@revision]`), of a model of transformers or open_clip.
            class_names: labels, or a mapping from labels to one name or several synonyms.
            template: text with `{}` in place of the name, or several, whose embeddings are averaged.
            fusion: name or config of a fusion that needs no fit.
            views: fields of the `ViewSpec` to change, e.g. `{"margin": 0.1}`.
            **options: see `Predictor`, e.g. `localizer`.

        Raises:
            L2R2Error: when the model cannot be loaded, or a class name or template is not valid.

        >>> predict = ZeroShotL2R2.from_pretrained("clip", ["cat", "dog"], localizer="owlv2:detector")  # doctest: +SKIP
        >>> predict("photo.jpg").label  # doctest: +SKIP
        'cat'
        """
        spec = ZeroShotSpec(source, Prompts.of(class_names, template), fusion, None, views or {})
        return cls(zero_shot_checkpoint(spec, f"{PREFIX}{source}"), **options)

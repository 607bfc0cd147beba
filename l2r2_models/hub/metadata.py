"""Author-supplied metadata of a model card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CardMetadata:
    """What a card says that a run does not know.

    Attributes:
        license: of the published weights, as the Hub writes it (`apache-2.0`, `cc-by-nc-4.0`, ...).
        data, data_license: name and license of the data set.
        localizer, prompt, localizer_license: what finds the boxes that the model is meant for.
        limits: one sentence of the author's about what the model is not for.
    """

    license: str | None = None
    data: str | None = None
    data_license: str | None = None
    localizer: str | None = None
    prompt: str | None = None
    localizer_license: str | None = None
    limits: str | None = None

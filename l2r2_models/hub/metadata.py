"""Author-supplied metadata of a model card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CardMetadata:
    """Author-supplied metadata, which a run does not record.

    Attributes:
        license: license of the published weights, as the Hub spells it (`apache-2.0`, `cc-by-nc-4.0`, ...).
        data, data_license: name and license of the data set.
        localizer, prompt, localizer_license: the localizer that the model is meant for.
        limits: a sentence on what the model should not be used for.
    """

    license: str | None = None
    data: str | None = None
    data_license: str | None = None
    localizer: str | None = None
    prompt: str | None = None
    localizer_license: str | None = None
    limits: str | None = None

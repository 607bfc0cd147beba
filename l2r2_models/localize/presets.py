"""Presets: localizers by what they are used for, with the model, the threshold and the license of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from .base import LocalizerSpec

NONE = "none"  # no localizer: only the whole image is classified


@dataclass(frozen=True)
class Preset:
    """A localizer for a purpose.

    Attributes:
        use: what it is for.
        spec: the localizer; a source or options given after the preset's name replace these.
        license: of the weights that the spec names.
    """

    use: str
    spec: str
    license: str

    @property
    def threshold(self) -> str:
        """The lowest score of a box."""
        return LocalizerSpec.parse(self.spec).options["threshold"][0]


OWLV2 = "owlv2:google/owlv2-base-patch16-ensemble?threshold=0.1"
PRESETS = {
    "camera-trap": Preset("animals of any kind", f"{OWLV2}&prompt=animal&prompt=bird&prompt=insect&prompt=reptile", "apache-2.0"),
    "prompt": Preset("objects that you can name; needs --prompt", OWLV2, "apache-2.0"),
}
LICENSES = {
    **{LocalizerSpec.parse(preset.spec).source: preset.license for preset in PRESETS.values()},
    **{f"florence-community/Florence-2-{size}": "mit" for size in ("base", "base-ft", "large", "large-ft")},
    "facebook/sam3": "other (SAM License)",
}


def expand(spec: LocalizerSpec) -> LocalizerSpec:
    """Replace the name of a preset by its localizer; other specs stay as they are.

    >>> expand(LocalizerSpec.parse("prompt:models/owlv2?prompt=mushroom")).options
    {'threshold': ('0.1',), 'prompt': ('mushroom',)}
    """
    if (preset := PRESETS.get(spec.name)) is None:
        return spec
    own = LocalizerSpec.parse(preset.spec)
    return LocalizerSpec(own.name, spec.source or own.source, {**own.options, **spec.options})


def license_of(spec: LocalizerSpec) -> str | None:
    """Return the license of a localizer's weights; None if it is not known here, as for a local folder."""
    return LICENSES.get(spec.source)

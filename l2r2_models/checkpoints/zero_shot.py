"""Vision-language models as checkpoints: `vlm:SOURCE?names=FILE`, wherever a command takes a run or a Hub id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..errors import L2R2Error
from ..views import ViewSpec
from ..zero_shot.model import ZeroShotNetwork
from ..zero_shot.prompts import TEMPLATE, Prompts, read_class_names, read_templates
from ..zero_shot.prototypes import prototypes_of
from ..zero_shot.towers import CONFIG, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, library_of, load_towers
from .download import download_files, hub_id_of, local_folder
from .fusion_file import read_fusion

PREFIX = "vlm:"
OPTIONS = ("names", "template", "templates", "fusion", "fg_mode", "margin")
TEXTS = ("*.json", "*.txt", "*.model")  # configs and tokenizers
WEIGHTS_OF = {"transformers": "model*.safetensors", "open_clip": OPEN_CLIP_WEIGHTS}


@dataclass(frozen=True)
class ZeroShotSpec:
    """A vision-language model, the classes that it tells apart, and how its views are cut and fused.

    As text it is `vlm:SOURCE?names=FILE`, with more options after `&`, percent-encoded as in a URL: `template=TEXT` (repeatable),
    `templates=FILE` (one per line), `fusion=NAME` or a file of `l2r2 fuse -o`, `fg_mode` and `margin` (see `ViewSpec`).

    Attributes:
        source: a folder, or a Hub id (`org/name[@revision]`).
        prompts: the class names and templates.
        fusion: name or config of a fusion; `max_confidence` as in the paper by default.
        fusion_file: file with a fitted fusion, instead of `fusion`.
        views: fields of the `ViewSpec` that replace those of the model's own preprocessing.
    """

    source: str
    prompts: Prompts
    fusion: str | Mapping[str, Any] = "max_confidence"
    fusion_file: Path | None = None
    views: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> ZeroShotSpec:
        """Read a spec from its text.

        Raises:
            L2R2Error: when an option is unknown, invalid or missing, or a file cannot be read.
        """
        source, _, query = text.removeprefix(PREFIX).partition("?")
        given = parse_qsl(query, keep_blank_values=True)
        options = dict(given)
        if unknown := [name for name in options if name not in OPTIONS]:
            raise L2R2Error(f'{text}: unknown option "{unknown[0]}"; choose from {", ".join(OPTIONS)}.')
        if not source or not options.get("names"):
            raise L2R2Error(f"{text}: needs a model and its class names: {PREFIX}FOLDER?names=FILE, with one name per line.")
        if "template" in options and "templates" in options:
            raise L2R2Error(f"{text}: template is a text and templates is a file of them; use one or the other.")
        templates = [value for name, value in given if name == "template"] or [TEMPLATE]
        if "templates" in options:
            templates = read_templates(options["templates"])
        prompts = Prompts.of(read_class_names(options["names"]), templates, options["names"])
        views: dict[str, Any] = {"fg_mode": options["fg_mode"]} if "fg_mode" in options else {}
        if "margin" in options:
            views["margin"] = _number(text, options["margin"])
        fusion = options.get("fusion", "max_confidence")
        file = Path(fusion) if Path(fusion).suffix == ".safetensors" else None
        return cls(source, prompts, "max_confidence" if file else fusion, file, views)


def is_zero_shot(source: str) -> bool:
    """Whether a model is given as a vision-language model.

    >>> is_zero_shot("vlm:google/siglip2-base-patch16-256?names=classes.txt")
    True
    """
    return source.startswith(PREFIX)


def build_zero_shot(spec: ZeroShotSpec) -> tuple[ZeroShotNetwork, str]:
    """Load the towers, compute the class prototypes or read them from the cache, and drop the text tower.

    Returns:
        The network in eval mode, and a SHA-256 over everything that affects its outputs.

    Raises:
        L2R2Error: when the model or the fusion cannot be loaded.
    """
    towers = load_towers(folder_of(spec.source))
    views = ViewSpec.from_dict({**towers.views.to_dict(), **spec.views})
    prompts = spec.prompts
    prototypes = prototypes_of(towers, prompts)
    fitted = None if spec.fusion_file is None else read_fusion(spec.fusion_file, prompts.labels)
    fusion = spec.fusion if fitted is None else fitted.config()
    model = ZeroShotNetwork(towers.image, prototypes, towers.scale, towers.bias, views, name=spec.source, fusion=fusion)
    if fitted is None and model.fusion.needs_fit:
        raise L2R2Error(f'{spec.source}: the fusion "{model.fusion.name}" must be fitted first; use `l2r2 fuse -o`.')
    if fitted is not None:
        model.fusion.load_state_dict(fitted.state_dict())
    state = {name: value.tolist() for name, value in model.fusion.state_dict().items()}
    about = [towers.digest, prompts.labels, prompts.names, prompts.templates, views.to_dict(), model.fusion.config(), state]
    return model.eval(), hashlib.sha256(json.dumps(about).encode()).hexdigest()


def folder_of(source: str) -> Path:
    """Return the folder of a model, downloaded if it is on the Hub; of the weights, only the safetensors that are used."""
    if (folder := local_folder(source)) is not None:
        return folder
    repo = hub_id_of(source)
    library = library_of(download_files(repo, (CONFIG, OPEN_CLIP_CONFIG)))
    patterns: Sequence[str] = (*TEXTS, WEIGHTS_OF[library])
    return download_files(repo, patterns)


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise L2R2Error(f"{text}: margin must be a number, got {value}.") from None

"""The parts of a model card on usage and on the localizer."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import L2R2Error
from ..localize.base import LocalizerSpec
from ..localize.presets import expand, license_of
from ..models.l2r2 import L2R2
from .markdown import code, literal, plain
from .metadata import CardMetadata

OWN_HEADS = {"head": "box head", "mask-head": "mask head"}  # localizers that are part of the model
PROMPTED = ("owlv2", "grounding-dino", "omdet-turbo", "florence2", "sam3")  # localizers that need a prompt


def takes_boxes(model: L2R2) -> bool:
    """Whether boxes affect the views of the model."""
    return model.branches != ("full",) and not model.finds_object


def usage(checkpoint: Checkpoint, repo: str, metadata: CardMetadata) -> str:
    """Write the section on usage, with snippets that run as pasted."""
    model = checkpoint.model
    with_boxes = _predictor_usage(model, repo, _localizer_spec(checkpoint, metadata)) if model.in_chans == 3 else ""
    alone = "is the whole-image branch alone" if model.branches[0] == "full" else f"is the {model.branches[0]} branch alone"
    if model.finds_object:
        alone = "gives the fused prediction, and needs no boxes: it finds the object itself"
    elif model.branches == ("full",):
        alone = "gives the same prediction"
    channels = " and in transformers' `pipeline`" if model.in_chans == 3 else f" (in_chans={model.in_chans})"
    return f"""## Use

Needs the Python package l2r2-models.
{with_boxes}
As a plain timm model{channels}, it {alone}:

```python
import timm
import l2r2_models  # registers the architecture

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
```
"""


def _predictor_usage(model: L2R2, repo: str, localizer: str | None) -> str:
    """The snippet for `Predictor`, with a given box or the model's own box head."""
    options = boxes = comment = other = ""
    if localizer in OWN_HEADS:
        options, comment = f', localizer="{localizer}"', f"  # the {OWN_HEADS[localizer]} of the model finds the object"
    elif takes_boxes(model):
        without = "it uses the whole image" if "full" in model.branches else "the whole image counts as the object"
        boxes, comment = ", boxes=[[130, 42, 410, 380]]", f"  # xyxy pixels of the object; without boxes, {without}"
        if localizer:
            other = f'# to find the boxes automatically: Predictor.from_pretrained("{repo}", localizer={literal(localizer)})\n'
    return f"""
```python
from PIL import Image
from l2r2_models import Predictor

predict = Predictor.from_pretrained("{repo}"{options})
{other}photo = Image.new("RGB", (640, 480), "gray")  # or the path of an image file
prediction = predict(photo{boxes}){comment}
print(prediction.label, prediction.score, prediction.reason)
```
"""


def localizer_metadata(checkpoint: Checkpoint, metadata: CardMetadata) -> dict[str, Any]:
    """Return the localizer the model is meant for; the author's metadata overrides the checkpoint's.

    A preset is replaced by its localizer, and the license of its weights is filled in if the author states none.
    """
    spec, license = metadata.localizer, metadata.localizer_license
    if spec:
        with suppress(L2R2Error):  # words that are not a spec stay as they are
            localizer = expand(LocalizerSpec.parse(spec))
            spec, license = str(localizer), license or license_of(localizer)
    given = {"spec": spec, "prompt": metadata.prompt, "license": license}
    return {**checkpoint.localizer, **{k: v for k, v in given.items() if v}}


def _localizer_spec(checkpoint: Checkpoint, metadata: CardMetadata) -> str | None:
    """The localizer as `Predictor` takes it; None if others cannot use it, as with a box file."""
    known = localizer_metadata(checkpoint, metadata)
    try:
        spec = LocalizerSpec.parse(str(known.get("spec", "")))
    except L2R2Error:
        return None
    if known.get("prompt"):
        spec = spec.with_option("prompt", str(known["prompt"]))
    if spec.name in PROMPTED:
        usable = bool(spec.source) and ("prompt" in spec.options or "objectness" in spec.options.get("score", ()))
    elif spec.name == "detr":
        usable = bool(spec.source)
    elif spec.name in OWN_HEADS:
        model = checkpoint.model
        usable = not spec.source and (model.box_head if spec.name == "head" else model.mask_head) is not None
    else:
        usable = spec.source.startswith("timm:") or (not spec.source and spec.name in ("ncut", "attn", "cam"))
    return str(spec) if usable and takes_boxes(checkpoint.model) else None


def localizer_part(checkpoint: Checkpoint, metadata: CardMetadata) -> str:
    """Write the section on the localizer; empty for a model that takes no boxes."""
    if not takes_boxes(checkpoint.model):
        return ""
    own = _localizer_spec(checkpoint, metadata)
    if own in OWN_HEADS:
        what = "boxes" if own == "head" else "masks"
        return f"## Localizer\n\nMeant for {what} from its own {OWN_HEADS[own]}, which is part of the model.\n"
    known = localizer_metadata(checkpoint, metadata)
    if not known.get("spec"):
        return "## Localizer\n\nThe model takes boxes, but comes without a localizer; use any that finds the objects.\n"
    prompt = f" with the prompt {code(known['prompt'])}" if known.get("prompt") else ""
    license = plain(known.get("license") or "not stated")
    return f"## Localizer\n\nMeant for boxes of {code(known['spec'])}{prompt}; license of the localizer: {license}.\n"

"""What a checkpoint's `config.json` holds: timm's layout, with what is ours under the key `l2r2`. Never a pickle."""

from __future__ import annotations

import inspect
from typing import Any

import timm
from timm.models import build_model_with_cfg

from ..boxes.detections import BOX_THRESHOLD
from ..errors import L2R2Error
from ..models.registry import FORMAT_VERSION, check_format
from ..runs import CONFIG, WEIGHTS
from ..views import ViewSpec

__all__ = ["CONFIG", "FORMAT_VERSION", "PICKLES", "WEIGHTS", "check_config"]

OURS = ("l2r2", "ifam")  # how the names of our architectures start
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# keys under `l2r2` and what they hold, beside model_args, which build the model; any other key is a newer version's, or a mistake
SECTION: dict[str, type] = {
    "training": dict,
    "localizer": dict,
    "calibration": dict,
}
BUILD: dict[str, type] = {"views": dict, "branches": list, "fusion": dict}  # what model_args cannot do without
# what timm's own functions would take out of model_args: where weights come from, and what becomes of the network
OF_THE_FACTORY = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name in inspect.signature(function).parameters
    if name != "kwargs"
} | {"features_only", "out_indices"}
# what would make timm look for weights elsewhere than beside the config
ELSEWHERE = ("url", "file", "state_dict", "custom_load", "hf_hub_id", "hf_hub_filename")


def check_config(config: dict[str, Any], name: str) -> None:
    """Whether a config.json is that of an L2R2 checkpoint which this version reads.

    Raises:
        L2R2Error: it is not; the message says what is wrong.
    """
    if not isinstance(config.get("l2r2"), dict):
        raise L2R2Error(f"{name}: {CONFIG} has no l2r2 section; this is not an L2R2 checkpoint.")
    ours, arguments = config["l2r2"], config.get("model_args")
    if not isinstance(arguments, dict):
        raise L2R2Error(f"{name}: {CONFIG} needs model_args as a mapping.")
    try:
        check_format(arguments.get("format_version"))
    except L2R2Error as error:
        raise L2R2Error(f"{name}: {error}") from None
    if unknown := sorted(set(ours) - set(SECTION)):
        raise L2R2Error(f"{name}: {CONFIG} has an unknown {unknown[0]} under l2r2; upgrade l2r2-models, or remove it.")
    if wrong := [k for k, kind in SECTION.items() if k in ours and not isinstance(ours[k], kind)]:
        raise L2R2Error(f"{name}: {CONFIG} has an unusable {wrong[0]} under l2r2.")
    labels = config.get("label_names", [])
    if not config["architecture"].startswith(OURS):
        raise L2R2Error(f"{name}: the architecture {config['architecture']} in {CONFIG} is not an L2R2 model.")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or len(set(labels)) != len(labels):
        raise L2R2Error(f"{name}: {CONFIG} needs label_names as a list of different names.")
    source = config.get("pretrained_cfg", {})
    if not isinstance(source, dict) or any(source.get(key) for key in ELSEWHERE):
        raise L2R2Error(f"{name}: {CONFIG} names weights elsewhere under pretrained_cfg; only {WEIGHTS} beside it is loaded.")
    _check_training(ours.get("training", {}), name)
    if wrong := sorted({*arguments} & OF_THE_FACTORY):  # the rest goes to the network, which has its own list
        raise L2R2Error(f"{name}: {CONFIG} has an unusable model_args: a checkpoint takes no {wrong[0]}; remove it.")
    for key, kind in BUILD.items():
        if not isinstance(arguments.get(key), kind):
            raise L2R2Error(f"{name}: {CONFIG} has no usable {key} under model_args.")
    ViewSpec.from_dict(arguments["views"])


def _check_training(training: dict[str, Any], name: str) -> None:
    recipe = training.get("recipe", {})
    threshold = recipe.get("box_threshold", BOX_THRESHOLD) if isinstance(recipe, dict) else None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise L2R2Error(f"{name}: {CONFIG} has an unusable recipe under l2r2.training.")

"""The schema of a checkpoint's `config.json`: timm's layout, with our settings under the key `l2r2`."""

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

OURS = ("l2r2", "ifam")  # prefixes of our architectures
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# types of the keys under `l2r2`; any other key is an error, or belongs to a newer version
SECTION: dict[str, type] = {
    "training": dict,
    "localizer": dict,
    "calibration": dict,
}
BUILD: dict[str, type] = {"views": dict, "branches": list, "fusion": dict}  # required in model_args
# arguments of timm's own functions, which could load other weights or change the network
OF_THE_FACTORY = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name in inspect.signature(function).parameters
    if name != "kwargs"
} | {"features_only", "out_indices"}
# keys of pretrained_cfg that make timm load weights from elsewhere
ELSEWHERE = ("url", "file", "state_dict", "custom_load", "hf_hub_id", "hf_hub_filename")


def check_config(config: dict[str, Any], name: str) -> None:
    """Check that a config.json belongs to an L2R2 checkpoint that this version can read.

    Args:
        config: the content of config.json.
        name: the checkpoint's name, for messages.

    Raises:
        L2R2Error: when it does not.
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
        raise L2R2Error(f"{name}: {CONFIG} has an unknown key {unknown[0]} under l2r2; upgrade l2r2-models, or remove it.")
    if wrong := [k for k, kind in SECTION.items() if k in ours and not isinstance(ours[k], kind)]:
        raise L2R2Error(f"{name}: {CONFIG} has an invalid {wrong[0]} under l2r2; it must be a mapping.")
    labels = config.get("label_names", [])
    if not config["architecture"].startswith(OURS):
        raise L2R2Error(f"{name}: the architecture {config['architecture']} in {CONFIG} is not an L2R2 model.")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or len(set(labels)) != len(labels):
        raise L2R2Error(f"{name}: {CONFIG} needs label_names as a list of distinct names.")
    source = config.get("pretrained_cfg", {})
    if not isinstance(source, dict) or any(source.get(key) for key in ELSEWHERE):
        raise L2R2Error(f"{name}: {CONFIG} points to external weights in pretrained_cfg; remove that, only {WEIGHTS} is loaded.")
    _check_training(ours.get("training", {}), name)
    if wrong := sorted({*arguments} & OF_THE_FACTORY):  # the network checks the other arguments
        raise L2R2Error(f"{name}: {CONFIG} has invalid model_args: {wrong[0]} is not allowed in a checkpoint; remove it.")
    for key, kind in BUILD.items():
        if not isinstance(arguments.get(key), kind):
            raise L2R2Error(f"{name}: {CONFIG} has no valid {key} under model_args; save the checkpoint again.")
    ViewSpec.from_dict(arguments["views"])


def _check_training(training: dict[str, Any], name: str) -> None:
    recipe = training.get("recipe", {})
    threshold = recipe.get("box_threshold", BOX_THRESHOLD) if isinstance(recipe, dict) else None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise L2R2Error(f"{name}: {CONFIG} has an invalid recipe under l2r2.training; box_threshold must be between 0 and 1.")

"""Checkpoints in timm's layout: `model.safetensors` + `config.json`, what is ours under the key `l2r2`. Never a pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from safetensors import safe_open
from timm.models import save_for_hf

from .errors import L2R2Error
from .files import file_sha256, read_json, write_json
from .model import L2R2
from .views import ViewSpec

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: in eval mode.
        labels: class names in the order of the logits.
        training: the configuration it was trained with, empty where unknown.
        name: what it was loaded from.
        digest: SHA-256 of the weights.
    """

    model: L2R2
    labels: tuple[str, ...]
    training: dict[str, Any]
    name: str
    digest: str

    @property
    def box_threshold(self) -> float:
        """Boxes with a lower score count as not found, as in training; 0.2 where the checkpoint does not say."""
        return self.training.get("recipe", {}).get("box_threshold", 0.2)


def save_checkpoint(model: L2R2, folder: str | Path, labels: Sequence[str], training: dict[str, Any] | None = None) -> None:
    """Write a checkpoint that timm, transformers and `load_checkpoint` read.

    Each file is replaced in one step, the weights first: a folder with `config.json` never lacks its weights.

    Args:
        model: an L2R2 made by `timm.create_model`.
        folder: where to; made if missing.
        labels: one name a class.
        training: the configuration it was trained with.

    Raises:
        L2R2Error: the number of labels differs from the model's classes, or the model was not made by timm.
    """
    if not model.pretrained_cfg.get("architecture"):
        raise L2R2Error("Only a model made by timm.create_model can be saved, because its name is what loads it again.")
    if len(labels) != model.num_classes:
        raise L2R2Error(f"{len(labels)} labels for {model.num_classes} classes.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".saving-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    spec = model.view_spec.to_dict()
    arguments = {
        **model.backbone_kwargs,  # older timm versions do not record them
        "branches": list(model.branches),
        "shared": model.shared,
        "fusion": model.fusion.config(),
        "views": spec,
    }
    if model.pretrained_cfg["architecture"] == "l2r2":
        arguments["backbone"] = model.backbone_name
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        ours = {"l2r2": {"format_version": FORMAT_VERSION, "views": spec, "branches": list(model.branches),
                         "fusion": model.fusion.config(), "training": training or {}}}  # fmt: skip
        save_for_hf(model, temporary, {"label_names": list(labels), **ours}, arguments, safe_serialization=True)
        config = read_json(Path(temporary) / CONFIG)
        # transformers passes num_classes itself and fails where model_args holds it too
        config["model_args"] = {k: v for k, v in {**config.get("model_args", {}), **arguments}.items() if k != "num_classes"}
        size = spec["size"]
        config["pretrained_cfg"].update(
            tag="finetuned", input_size=[model.in_chans, size, size], num_classes=model.num_classes, crop_pct=1.0,
            mean=spec["mean"], std=spec["std"], interpolation=spec["interpolation"],
        )  # fmt: skip
        for stale in ("test_input_size", "test_crop_pct", "test_pool_size"):
            config["pretrained_cfg"].pop(stale, None)
        config["pretrained_cfg"]["pool_size"] = None  # holds for the source's input size only
        os.chmod(Path(temporary) / WEIGHTS, 0o644)
        os.replace(Path(temporary) / WEIGHTS, folder / WEIGHTS)
        write_json(folder / CONFIG, config)


def load_checkpoint(source: str | Path, *, any_fusion: bool = False) -> Checkpoint:
    """Load a run's folder, or a Hub repository (`org/name` or `hf-hub:org/name[@revision]`).

    Args:
        source: folder or Hub id.
        any_fusion: accept weights whose fusion is not the one that the config names, in order to fit it anew.

    Raises:
        L2R2Error: not a checkpoint, of a newer format, damaged, or not reachable; the message says what to do.
    """
    name = str(source)
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        location, config_path, weights_path = f"local-dir:{folder}", folder / CONFIG, folder / WEIGHTS
        for path in (config_path, weights_path):
            if not path.exists():
                raise L2R2Error(f"{folder}: is not a checkpoint, it has no {path.name}.")
    else:
        location, config_path, weights_path = _download(name)
    config = read_json(config_path)
    _check_config(config, name)
    try:
        model = cast(L2R2, timm.create_model(location, pretrained=True))
    except L2R2Error:
        raise
    except Exception as error:  # safetensors, torch and timm each have their own for a damaged file
        raise L2R2Error(f"{name}: the checkpoint cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    if not any_fusion:
        _check_fusion(model, weights_path, name)
    labels = tuple(config.get("label_names") or (str(i) for i in range(model.num_classes)))
    if len(labels) != model.num_classes:
        raise L2R2Error(f"{name}: {len(labels)} label_names for {model.num_classes} classes in {CONFIG}.")
    training = config["l2r2"].get("training", {})
    return Checkpoint(model.eval(), labels, training, name, file_sha256(weights_path))


def _check_fusion(model: L2R2, weights: Path, name: str) -> None:
    """A save that was killed between its two files leaves a fusion of one kind with the numbers of another."""
    with safe_open(weights, "pt") as file:
        saved = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys() if k.startswith("fusion.")}  # noqa: SIM118
    if saved != {f"fusion.{k}": tuple(v.shape) for k, v in model.fusion.state_dict().items()}:
        raise L2R2Error(f"{name}: {WEIGHTS} and {CONFIG} are of different saves; fit the fusion again with `l2r2 fuse`.")


def _check_config(config: Any, name: str) -> None:
    if not isinstance(config, dict) or not isinstance(config.get("l2r2"), dict):
        raise L2R2Error(f"{name}: {CONFIG} has no l2r2 section; this is not an L2R2 checkpoint.")
    ours = config["l2r2"]
    kinds = {"views": dict, "branches": list, "fusion": dict, "training": dict, "format_version": int}
    if wrong := [k for k, kind in kinds.items() if k in ours and not isinstance(ours[k], kind)]:
        raise L2R2Error(f"{name}: {CONFIG} has an unusable {wrong[0]} under l2r2.")
    labels = config.get("label_names", [])
    if not isinstance(config.get("model_args"), dict):
        raise L2R2Error(f"{name}: {CONFIG} needs model_args as a mapping.")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or len(set(labels)) != len(labels):
        raise L2R2Error(f"{name}: {CONFIG} needs label_names as a list of different names.")
    recipe = ours.get("training", {}).get("recipe", {})
    threshold = recipe.get("box_threshold", 0.2) if isinstance(recipe, dict) else None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise L2R2Error(f"{name}: {CONFIG} has an unusable recipe under l2r2.training.")
    if ours.get("format_version", 0) > FORMAT_VERSION:
        raise L2R2Error(
            f"{name}: checkpoint format {ours.get('format_version')} is newer than {FORMAT_VERSION}; upgrade l2r2-models."
        )
    arguments = config["model_args"]
    for key in ("views", "branches", "fusion"):
        if key not in ours:
            raise L2R2Error(f"{name}: {CONFIG} has no {key} under l2r2.")
        if arguments.get(key) != ours.get(key):
            raise L2R2Error(f"{name}: {CONFIG} says two things about {key}, under model_args and under l2r2.")
    ViewSpec.from_dict(ours["views"])


def _download(name: str) -> tuple[str, Path, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    try:
        paths = [Path(hf_hub_download(repo, file, revision=revision or None)) for file in (CONFIG, WEIGHTS)]
    except HFValidationError:
        raise L2R2Error(f"{name}: no such folder, and not a Hub id of the form org/name.") from None
    except LocalEntryNotFoundError:
        if "/" not in repo:
            raise L2R2Error(f"{name}: no such folder (a Hub id has the form org/name).") from None
        hint = f"download it once with `hf download {repo}`"
        raise L2R2Error(f"{name}: no such folder, and the Hub cannot be reached; {hint}.") from None
    except HfHubHTTPError as error:
        raise L2R2Error(f"{name}: the Hub does not serve it ({str(error).splitlines()[0]}).") from error
    return f"hf-hub:{repo}" + (f"@{revision}" if revision else ""), paths[0], paths[1]

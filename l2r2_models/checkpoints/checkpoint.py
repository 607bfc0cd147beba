"""Checkpoints in timm's layout: `model.safetensors` and `config.json`, with our settings under the key `l2r2`. Never a pickle."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import save_for_hf

from ..boxes.detections import BOX_THRESHOLD
from ..errors import L2R2Error
from ..fusion import INPUTS, Fusion, create_fusion
from ..io import MODE, file_sha256, read_json, write_json
from ..models.l2r2 import L2R2
from ..runs import changed_weights
from .download import check_hash, local_folder, open_checkpoint
from .format import CONFIG, FORMAT_VERSION, WEIGHTS, check_config
from .zero_shot import ZeroShotSpec, build_zero_shot, is_zero_shot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: the model, in eval mode.
        labels: class names in the order of the logits.
        training: the configuration it was trained with; empty if unknown.
        name: the folder or Hub id that it was loaded from.
        digest: SHA-256 of the weights.
        localizer: the localizer to use with the model (its spec, default prompt and license); empty if unknown.
    """

    model: L2R2
    labels: tuple[str, ...]
    training: dict[str, Any]
    name: str
    digest: str
    localizer: dict[str, Any] = field(default_factory=dict)

    @property
    def box_threshold(self) -> float:
        """Score below which a box counts as not found, as in training; 0.2 if the checkpoint does not store it."""
        threshold: float = self.training.get("recipe", {}).get("box_threshold", BOX_THRESHOLD)
        return threshold


def save_checkpoint(
    model: L2R2,
    folder: str | Path,
    labels: Sequence[str],
    training: dict[str, Any] | None = None,
    *,
    localizer: dict[str, Any] | None = None,
    before: Callable[[str], None] = lambda digest: None,
) -> str:
    """Write a checkpoint that timm, transformers and `load_checkpoint` can load.

    Each file is replaced atomically, the weights first, so a folder with `config.json` always has its weights.

    Args:
        model: an L2R2 made by `timm.create_model`.
        folder: the folder to write to; created if missing.
        labels: one name per class.
        training: the configuration it was trained with.
        localizer: the localizer to use with the model: its spec, default prompt and license.
        before: called with the SHA-256 of the new weights before they replace the old ones.

    Returns:
        The SHA-256 of the weights.

    Raises:
        L2R2Error: when the number of labels differs from the number of classes, or the model was not made by timm.

    >>> model = timm.create_model("l2r2_resnet18", num_classes=2)
    >>> save_checkpoint(model, "runs/fungi", ["edible", "poisonous"])  # doctest: +SKIP
    """
    if not model.pretrained_cfg.get("architecture"):
        raise L2R2Error("Only a model made by timm.create_model can be saved, because its name is needed to load it.")
    if len(labels) != model.num_classes:
        raise L2R2Error(f"Got {len(labels)} labels for {model.num_classes} classes; pass one label per class.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".saving-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    spec = model.view_spec.to_dict()
    arguments = {**model.arguments(), "format_version": FORMAT_VERSION}  # the only part of the config that timm passes on
    if model.pretrained_cfg["architecture"] == "l2r2":
        arguments["backbone"] = model.backbone_name
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        ours = {"calibration": _temperatures(model), "localizer": localizer or {}, "training": training or {}}
        hook = model.register_state_dict_post_hook(_untie)  # type: ignore[no-untyped-call]
        save_for_hf(model, temporary, {"label_names": list(labels), "l2r2": ours}, arguments, safe_serialization=True)
        hook.remove()
        config = read_json(Path(temporary) / CONFIG)
        # transformers passes num_classes itself, and fails if model_args has it too
        config["model_args"] = {k: v for k, v in {**config.get("model_args", {}), **arguments}.items() if k != "num_classes"}
        size = model.view_spec.size_of(model.branches[0])  # of the branch that `model(x)` uses
        config["pretrained_cfg"].update(
            tag="finetuned",
            input_size=[model.in_chans, size, size],
            num_classes=model.num_classes,
            crop_pct=1.0,
            crop_mode=model.view_spec.crop_mode,
            mean=spec["mean"],
            std=spec["std"],
            interpolation=spec["interpolation"],
        )
        for stale in ("test_input_size", "test_crop_pct", "test_pool_size"):
            config["pretrained_cfg"].pop(stale, None)
        config["pretrained_cfg"]["pool_size"] = None  # only valid for the source's input size
        os.chmod(Path(temporary) / WEIGHTS, MODE)
        digest = file_sha256(Path(temporary) / WEIGHTS)
        before(digest)
        os.replace(Path(temporary) / WEIGHTS, folder / WEIGHTS)
        write_json(folder / CONFIG, config)
    return digest


def _untie(model: Any, state: dict[str, Any], *_: Any) -> None:
    """Copy each tensor, because safetensors refuses tensors that share memory."""
    state.update({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()})


def _temperatures(model: L2R2) -> dict[str, Any]:
    """Fitted temperatures by branch (one, or one per class), for readers of the config; loading uses the buffers."""
    fitted = getattr(model.fusion, "temperatures", None)
    if fitted is None:
        return {}
    rows = [[round(t, 6) for t in row] for row in fitted.tolist()]
    order = [b for b in INPUTS if b in (model.fusion.over or model.branches)]
    return {"temperatures": {b: row[0] if len(row) == 1 else row for b, row in zip(order, rows)}}


def load_checkpoint(source: str | Path, *, any_fusion: bool = False) -> Checkpoint:
    """Load a checkpoint from a run's folder or a Hub repository.

    Args:
        source: a folder, a Hub id (`org/name` or `hf-hub:org/name[@revision]`), or a vision-language model that is not
            trained further (`vlm:SOURCE?names=FILE`, see `ZeroShotSpec`).
        any_fusion: accept weights whose fusion differs from the config's, in order to fit it again.

    Raises:
        L2R2Error: when the source is not a checkpoint, has a newer format or pickled weights, is damaged, or cannot be reached.

    >>> load_checkpoint("runs/fungi").labels  # doctest: +SKIP
    ('edible', 'poisonous')
    """
    name = str(source)
    if is_zero_shot(name):
        return zero_shot_checkpoint(ZeroShotSpec.parse(name), name)
    folder, config = open_checkpoint(name)
    check_config(config, name)
    digest = file_sha256(folder / WEIGHTS)
    if folder != local_folder(name):
        check_hash(folder / WEIGHTS, digest, name)
    elif changed_weights(folder, digest):
        logger.warning("%s: %s was changed after training (its SHA-256 differs from run.json)", name, WEIGHTS)
    try:
        model = cast(L2R2, timm.create_model(f"local-dir:{folder}", pretrained=True))
    except L2R2Error as error:
        raise L2R2Error(f"{name}: {error}") from error
    except Exception as error:  # safetensors, torch and timm each raise their own for a damaged file
        raise L2R2Error(f"{name}: the checkpoint cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    if not any_fusion:
        _check_fusion(model, folder / WEIGHTS, name)
    labels = tuple(config.get("label_names") or (str(i) for i in range(model.num_classes)))
    if len(labels) != model.num_classes:
        raise L2R2Error(f"{name}: {CONFIG} has {len(labels)} label_names for {model.num_classes} classes; list one per class.")
    ours = config["l2r2"]
    return Checkpoint(model.eval(), labels, ours.get("training", {}), name, digest, ours.get("localizer", {}))


def zero_shot_checkpoint(spec: ZeroShotSpec, name: str) -> Checkpoint:
    """Load a vision-language model that classifies without training.

    Args:
        spec: the model and its classes.
        name: its name, for messages and files.

    Raises:
        L2R2Error: when it cannot be loaded.
    """
    model, digest = build_zero_shot(spec)
    return Checkpoint(model, spec.prompts.labels, {}, name, digest)


def load_fusion(source: str | Path) -> tuple[Fusion, tuple[str, ...]]:
    """Load only the fusion of a checkpoint and the class names, without building the network.

    Args:
        source: see `load_checkpoint`.

    Raises:
        L2R2Error: when the source is not a checkpoint, or is damaged.
    """
    name = str(source)
    folder, config = open_checkpoint(name)
    check_config(config, name)
    arguments, labels = config["model_args"], tuple(config.get("label_names") or map(str, range(config["num_classes"])))
    try:
        fusion = create_fusion(arguments["fusion"], arguments["branches"], len(labels)).eval()
        with safe_open(folder / WEIGHTS, "pt") as file:
            state = {k.removeprefix("fusion."): file.get_tensor(k) for k in file.keys() if k.startswith("fusion.")}  # noqa: SIM118
        fusion.load_state_dict(state)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise L2R2Error(f"{name}: the fusion cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    return fusion, labels


def _check_fusion(model: L2R2, weights: Path, name: str) -> None:
    """Check that weights and config have the same fusion; if a save is killed between the two files, they differ."""
    with safe_open(weights, "pt") as file:
        saved = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys() if k.startswith("fusion.")}  # noqa: SIM118
    if saved != {f"fusion.{k}": tuple(v.shape) for k, v in model.fusion.state_dict().items()}:
        raise L2R2Error(f"{name}: {WEIGHTS} and {CONFIG} are from different saves; fit the fusion again with `l2r2 fuse`.")

"""Checkpoints in timm's layout: `model.safetensors` + `config.json`, what is ours under the key `l2r2`. Never a pickle."""

from __future__ import annotations

import inspect
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
from safetensors import safe_open
from timm.models import build_model_with_cfg, save_for_hf

from ..errors import L2R2Error
from ..fusion import INPUTS
from ..io import MODE, file_sha256, read_json, write_json
from ..models.l2r2 import L2R2
from ..views import ViewSpec

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
RUN = "run.json"  # what a run says of itself
OURS = ("l2r2", "ifam")  # how the names of our architectures start
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# keys under `l2r2` and what they hold; any other key is a newer version's, or a mistake
SECTION: dict[str, type] = {
    "format_version": int,
    "views": dict,
    "branches": list,
    "fusion": dict,
    "training": dict,
    "localizer": dict,
    "calibration": dict,
}
# what timm's own functions would take out of model_args: where weights come from, and what becomes of the network
OF_THE_FACTORY = {
    name
    for function in (timm.create_model, build_model_with_cfg)
    for name in inspect.signature(function).parameters
    if name != "kwargs"
} | {"features_only", "out_indices"}
# what would make timm look for weights elsewhere than beside the config
ELSEWHERE = ("url", "file", "state_dict", "custom_load", "hf_hub_id", "hf_hub_filename")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: in eval mode.
        labels: class names in the order of the logits.
        training: the configuration it was trained with, empty where unknown.
        name: what it was loaded from.
        digest: SHA-256 of the weights.
        localizer: the localizer that the model is meant for (its spec, default prompt, licence), empty where unknown.
    """

    model: L2R2
    labels: tuple[str, ...]
    training: dict[str, Any]
    name: str
    digest: str
    localizer: dict[str, Any] = field(default_factory=dict)

    @property
    def box_threshold(self) -> float:
        """Boxes with a lower score count as not found, as in training; 0.2 where the checkpoint does not say."""
        return self.training.get("recipe", {}).get("box_threshold", 0.2)


def save_checkpoint(
    model: L2R2,
    folder: str | Path,
    labels: Sequence[str],
    training: dict[str, Any] | None = None,
    *,
    localizer: dict[str, Any] | None = None,
    before: Callable[[str], None] = lambda digest: None,
) -> str:
    """Write a checkpoint that timm, transformers and `load_checkpoint` read.

    Each file is replaced in one step, the weights first: a folder with `config.json` never lacks its weights.

    Args:
        model: an L2R2 made by `timm.create_model`.
        folder: where to; made if missing.
        labels: one name a class.
        training: the configuration it was trained with.
        localizer: the localizer that the model is meant for: its spec, default prompt, licence.
        before: called with the SHA-256 of the new weights before they replace the old ones.

    Returns:
        The SHA-256 of the weights.

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
    arguments = {**model.arguments(), "format_version": FORMAT_VERSION}  # timm passes on no other part of the config
    if model.pretrained_cfg["architecture"] == "l2r2":
        arguments["backbone"] = model.backbone_name
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        ours = {"format_version": FORMAT_VERSION, "views": spec, "branches": list(model.branches),
                "fusion": model.fusion.config(), "calibration": _temperatures(model), "localizer": localizer or {},
                "training": training or {}}  # fmt: skip
        hook = model.register_state_dict_post_hook(_untie)
        save_for_hf(model, temporary, {"label_names": list(labels), "l2r2": ours}, arguments, safe_serialization=True)
        hook.remove()
        config = read_json(Path(temporary) / CONFIG)
        # transformers passes num_classes itself and fails where model_args holds it too
        config["model_args"] = {k: v for k, v in {**config.get("model_args", {}), **arguments}.items() if k != "num_classes"}
        size = spec["size"]
        config["pretrained_cfg"].update(
            tag="finetuned", input_size=[model.in_chans, size, size], num_classes=model.num_classes, crop_pct=1.0,
            crop_mode=crop_mode(spec["square"]), mean=spec["mean"], std=spec["std"], interpolation=spec["interpolation"],
        )  # fmt: skip
        for stale in ("test_input_size", "test_crop_pct", "test_pool_size"):
            config["pretrained_cfg"].pop(stale, None)
        config["pretrained_cfg"]["pool_size"] = None  # holds for the source's input size only
        os.chmod(Path(temporary) / WEIGHTS, MODE)
        digest = file_sha256(Path(temporary) / WEIGHTS)
        before(digest)
        os.replace(Path(temporary) / WEIGHTS, folder / WEIGHTS)
        write_json(folder / CONFIG, config)
    return digest


def crop_mode(square: bool) -> str:
    """timm's name for the way to a full view: padded to a square, or stretched; its default cuts the sides off."""
    return "border" if square else "squash"


def _untie(model: Any, state: dict[str, Any], *_: Any) -> None:
    """A copy of each tensor: safetensors takes no two names of one piece of memory, as layers that share weights have."""
    state.update({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()})


def _temperatures(model: L2R2) -> dict[str, Any]:
    """Fitted temperatures by branch (one, or one a class), for people who read the config; the buffers are what counts."""
    fitted = getattr(model.fusion, "temperatures", None)
    if fitted is None:
        return {}
    rows = [[round(t, 6) for t in row] for row in fitted.tolist()]
    order = [b for b in INPUTS if b in (model.fusion.over or model.branches)]
    return {"temperatures": {b: row[0] if len(row) == 1 else row for b, row in zip(order, rows)}}


def load_checkpoint(source: str | Path, *, any_fusion: bool = False) -> Checkpoint:
    """Load a run's folder, or a Hub repository (`org/name` or `hf-hub:org/name[@revision]`).

    Args:
        source: folder or Hub id.
        any_fusion: accept weights whose fusion is not the one that the config names, in order to fit it anew.

    Raises:
        L2R2Error: not a checkpoint, of a newer format, damaged, with pickled weights, or not reachable; the message says
            what to do.
    """
    name = str(source)
    folder, config = open_checkpoint(name)
    check_config(config, name)
    digest = file_sha256(folder / WEIGHTS)
    if folder != local_folder(name):
        check_hash(folder / WEIGHTS, digest, name)
    elif changed_weights(folder, digest):
        logger.warning("%s: %s is not what the run wrote (its SHA-256 differs from run.json)", name, WEIGHTS)
    try:
        model = cast(L2R2, timm.create_model(f"local-dir:{folder}", pretrained=True))
    except L2R2Error as error:
        raise L2R2Error(f"{name}: {error}") from error
    except Exception as error:  # safetensors, torch and timm each have their own for a damaged file
        raise L2R2Error(f"{name}: the checkpoint cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    if not any_fusion:
        _check_fusion(model, folder / WEIGHTS, name)
    labels = tuple(config.get("label_names") or (str(i) for i in range(model.num_classes)))
    if len(labels) != model.num_classes:
        raise L2R2Error(f"{name}: {len(labels)} label_names for {model.num_classes} classes in {CONFIG}.")
    ours = config["l2r2"]
    return Checkpoint(model.eval(), labels, ours.get("training", {}), name, digest, ours.get("localizer", {}))


def changed_weights(folder: Path, digest: str) -> bool:
    """Whether the weights of a run, whose SHA-256 is `digest`, are others than those that it recorded."""
    record = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    known = record.get("weights_sha256", digest) if isinstance(record, dict) else digest
    return digest not in (known if isinstance(known, list) else [known])


def local_folder(name: str) -> Path | None:
    """The folder that a name of a checkpoint stands for; None where it is to be looked for on the Hub."""
    folder = Path(name.removeprefix("local-dir:"))
    return folder if folder.is_dir() else None


def hub_id_of(name: str) -> str:
    """The Hub repository that a name stands for which is no folder here; it is logged where it might be a mistyped path.

    Raises:
        L2R2Error: it is a path that does not exist.
    """
    if name.startswith("hf-hub:"):
        return name
    path = Path(name.removeprefix("local-dir:"))
    is_path = name.startswith(("local-dir:", "/", ".", "~")) or len(path.parts) != 2 or path.parent.exists()
    if is_path:
        raise L2R2Error(f"{name}: no such folder; a repository on the Hub is hf-hub:org/name.")
    logger.info("%s: no such folder here, asking the Hub for %s", name, name.partition("@")[0])
    return name


def open_checkpoint(name: str) -> tuple[Path, dict[str, Any]]:
    """Folder and config.json of a checkpoint in timm's layout, downloaded where it is not a folder.

    Raises:
        L2R2Error: no checkpoint, with pickled weights, or not reachable.
    """
    folder = local_folder(name) or download(hub_id_of(name))
    if pickled := pickles_in(folder):
        raise L2R2Error(f"{folder}: holds {pickled[0]}; pickled weights are never loaded, only {WEIGHTS}. Remove it.")
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise L2R2Error(f"{folder}: is neither a run nor a checkpoint, it has no {file}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise L2R2Error(f"{name}: is not a checkpoint in timm's layout, its {CONFIG} names no architecture.")
    return folder, config


def pickles_in(folder: Path) -> list[str]:
    """Names of the files of a folder (not of folders in it) that would be unpickled by whoever loads them."""
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES and p.is_file())


def check_hash(weights: Path, digest: str, name: str) -> None:
    """A file of the Hub's large storage is kept under its SHA-256 in the cache; one that differs came broken or was changed.

    Raises:
        L2R2Error: it differs.
    """
    stored = weights.resolve().name
    if len(stored) == 64 and stored != digest:
        repo = name.removeprefix("hf-hub:").partition("@")[0]
        raise L2R2Error(
            f"{name}: {WEIGHTS} is not what the Hub announced (its SHA-256 differs); "
            f"get it again with `hf download {repo} --force-download`."
        )


def _check_fusion(model: L2R2, weights: Path, name: str) -> None:
    """A save that was killed between its two files leaves a fusion of one kind with the numbers of another."""
    with safe_open(weights, "pt") as file:
        saved = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys() if k.startswith("fusion.")}  # noqa: SIM118
    if saved != {f"fusion.{k}": tuple(v.shape) for k, v in model.fusion.state_dict().items()}:
        raise L2R2Error(f"{name}: {WEIGHTS} and {CONFIG} are of different saves; fit the fusion again with `l2r2 fuse`.")


def check_format(version: Any) -> None:
    """Whether a checkpoint of this format can be read.

    Raises:
        L2R2Error: a newer format, or no format at all.
    """
    if type(version) is not int or version < 1:  # True is an int
        raise L2R2Error(f"a checkpoint's format_version is a whole number from 1, not {version!r}.")
    if version > FORMAT_VERSION:
        raise L2R2Error(f"checkpoint format {version} is newer than {FORMAT_VERSION}; upgrade l2r2-models.")


def check_config(config: dict[str, Any], name: str) -> None:
    """Whether a config.json is that of an L2R2 checkpoint which this version reads.

    Raises:
        L2R2Error: it is not; the message says what is wrong.
    """
    if not isinstance(config.get("l2r2"), dict):
        raise L2R2Error(f"{name}: {CONFIG} has no l2r2 section; this is not an L2R2 checkpoint.")
    ours = config["l2r2"]
    try:
        check_format(ours.get("format_version"))
    except L2R2Error as error:
        raise L2R2Error(f"{name}: {error}") from None
    if unknown := sorted(set(ours) - set(SECTION)):
        raise L2R2Error(f"{name}: {CONFIG} has an unknown {unknown[0]} under l2r2; upgrade l2r2-models, or remove it.")
    if wrong := [k for k, kind in SECTION.items() if k in ours and not isinstance(ours[k], kind)]:
        raise L2R2Error(f"{name}: {CONFIG} has an unusable {wrong[0]} under l2r2.")
    labels = config.get("label_names", [])
    if not config["architecture"].startswith(OURS):
        raise L2R2Error(f"{name}: the architecture {config['architecture']} in {CONFIG} is not an L2R2 model.")
    if not isinstance(config.get("model_args"), dict):
        raise L2R2Error(f"{name}: {CONFIG} needs model_args as a mapping.")
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels) or len(set(labels)) != len(labels):
        raise L2R2Error(f"{name}: {CONFIG} needs label_names as a list of different names.")
    source = config.get("pretrained_cfg", {})
    if not isinstance(source, dict) or any(source.get(key) for key in ELSEWHERE):
        raise L2R2Error(f"{name}: {CONFIG} names weights elsewhere under pretrained_cfg; only {WEIGHTS} beside it is loaded.")
    _check_training(ours.get("training", {}), name)
    arguments = config["model_args"]
    if wrong := sorted({*arguments} & OF_THE_FACTORY):  # the rest goes to the network, which has its own list
        raise L2R2Error(f"{name}: {CONFIG} has an unusable model_args: a checkpoint takes no {wrong[0]}; remove it.")
    for key in ("format_version", "views", "branches", "fusion"):
        if key not in ours:
            raise L2R2Error(f"{name}: {CONFIG} has no {key} under l2r2.")
        if key not in arguments:
            raise L2R2Error(f"{name}: {CONFIG} has no {key} under model_args; a development version saved it, train it again.")
        if arguments.get(key) != ours.get(key):
            raise L2R2Error(f"{name}: {CONFIG} says two things about {key}, under model_args and under l2r2.")
    ViewSpec.from_dict(ours["views"])


def _check_training(training: dict[str, Any], name: str) -> None:
    recipe = training.get("recipe", {})
    threshold = recipe.get("box_threshold", 0.2) if isinstance(recipe, dict) else None
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise L2R2Error(f"{name}: {CONFIG} has an unusable recipe under l2r2.training.")


def download(name: str) -> Path:
    """The cached folder with config and weights of one commit: what is cached is not downloaded, what broke off continues."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    try:
        config = Path(hf_hub_download(repo, CONFIG, revision=revision or None))
        # of the same commit, even if somebody pushes between the two downloads
        return Path(hf_hub_download(repo, WEIGHTS, revision=config.parent.name)).parent
    except HFValidationError:
        raise L2R2Error(f"{name}: no such folder, and not a Hub id of the form org/name.") from None
    except Exception as error:  # those of huggingface_hub and of the HTTP client under it have no common base
        raise L2R2Error(f"{name}: {_why_not(error, name, repo, revision)}.") from error


def _why_not(error: Exception, name: str, repo: str, revision: str) -> str:
    """What to do about an error of a download, in words."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if "/" not in repo:
            return "no such folder (a Hub id has the form org/name)"
        return f"no such folder, and the Hub cannot be reached; download it once with `hf download {repo}`"
    if isinstance(error, errors.GatedRepoError):
        return f"access to {repo} must be asked for on its Hub page, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such folder, and the Hub has no {repo}, or it is private: log in with `hf auth login` if it is yours"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub's {repo} has no revision {revision}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the Hub's {repo} has no {CONFIG} with a {WEIGHTS}, so it holds no checkpoint"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub does not serve it ({str(error).splitlines()[0]})"
    return f"the download stopped ({' '.join(str(error).split())[:200]}); the same call continues it"

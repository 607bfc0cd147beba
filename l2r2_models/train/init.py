"""Initialize a training from a checkpoint (`init` of a recipe): its weights and, if no model is named, its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoints.download import check_hash, local_folder, open_checkpoint
from ..checkpoints.format import WEIGHTS, check_config
from ..checkpoints.provenance import Source, source_of_training
from ..errors import L2R2Error
from ..io import file_sha256
from ..models.l2r2 import L2R2
from ..models.registry import backbone_weights, classifier_name
from ..runs import RUN, record_of
from ..views import ViewSpec

OF_RECIPE = (
    "fg_mode",
    "margin",
    "late_stage",
    "late_pool",
    "coverage",
    "size",
    "sizes",
)  # the fields of a ViewSpec that a recipe always sets
NOT_OF_BACKBONE = ("views", "fusion", "format_version", "in_chans", "img_size", "num_classes")


@dataclass(frozen=True)
class InitCheckpoint:
    """A checkpoint to start from: an L2R2 run or Hub repository, or a timm classifier in timm's layout.

    Attributes:
        name: the folder or Hub id it was read from.
        folder: folder of its files.
        config: contents of its config.json.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def read(cls, name: str) -> InitCheckpoint:
        """Open a checkpoint.

        Args:
            name: a folder or a Hub id.

        Raises:
            L2R2Error: when there is no checkpoint, it cannot be downloaded, its config is unusable or of a newer format, or its
                weights are pickled.
        """
        folder, config = open_checkpoint(name)
        if "l2r2" in config:
            check_config(config, name)
        wrong = [k for k in ("pretrained_cfg", "model_args") if not isinstance(config.get(k, {}), dict)]
        labels = config.get("label_names") or []
        wrong += [] if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else ["label_names"]
        if not wrong and config["architecture"] == "l2r2" and not isinstance(config.get("model_args", {}).get("backbone"), str):
            wrong.append("model_args (no backbone)")
        if wrong:
            raise L2R2Error(f"{name}: config.json has an invalid {wrong[0]}; save the checkpoint again.")
        return cls(name, folder, config)

    @property
    def is_ours(self) -> bool:
        """Whether it is a checkpoint of l2r2-models, and not of timm."""
        return "l2r2" in self.config

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits; empty if the checkpoint does not list them."""
        return tuple(self.config.get("label_names") or ())

    @property
    def _cfg(self) -> Mapping[str, Any]:
        cfg: Mapping[str, Any] = self.config.get("pretrained_cfg", {})
        return cfg

    # ---- its settings ----

    def recipe_keys(self) -> dict[str, Any]:
        """Return the `Recipe` keys that make a model like the checkpoint's."""
        arguments, architecture = dict(self.config.get("model_args", {})), self.config["architecture"]
        keys: dict[str, Any] = {}
        if self.is_ours:
            ours = ("branches", "shared", "box_head", "mask_head", "prototype_dim", "num_parts")
            keys = {key: arguments.pop(key) for key in ours if key in arguments}
            views = arguments.pop("views")
            keys.update({key: views[key] for key in OF_RECIPE if key in views and (key, views[key]) != ("fg_mode", "parts")})
            keys.update({key: v for key, v in self._training().get("recipe", {}).items() if key == "box_threshold"})
            if architecture == "l2r2":
                architecture = f"timm:{arguments.pop('backbone')}"
        else:
            architecture = f"timm:{architecture}"
            sides = arguments.get("img_size") or self._cfg.get("input_size") or []
            keys.update({"size": sides[-1] if isinstance(sides, list) else sides} if sides else {})
        keys.update({key: arguments.pop(f"{key}_rate") for key in ("drop", "drop_path") if f"{key}_rate" in arguments})
        backbone = {k: v for k, v in arguments.items() if k not in NOT_OF_BACKBONE}
        return {"model": architecture, "backbone": backbone or None, **keys}

    def views(self) -> dict[str, Any]:
        """Return the fields of a `ViewSpec` that no recipe sets, such as the normalization that the weights expect.

        Raises:
            L2R2Error: when mean or std in config.json are invalid.
        """
        if self.is_ours:
            spec = ViewSpec.from_dict(self.config["model_args"]["views"])
            return {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in OF_RECIPE}
        found = {key: self._cfg[key] for key in ("mean", "std", "interpolation") if key in self._cfg}
        colors = [found[key] for key in ("mean", "std") if key in found]
        if not all(isinstance(c, list) and len(c) == 3 and all(isinstance(x, (int, float)) for x in c) for c in colors):
            raise L2R2Error(f"{self.name}: mean and std in config.json must be lists of three numbers.")
        return found

    def about(self) -> dict[str, Any]:
        """Return what a run records about its initialization: name, digest and source of the weights.

        The fitted values of the fusion are left out of the digest, because they are never copied.

        Raises:
            L2R2Error: when the weights are damaged or differ from the SHA-256 on the Hub.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self._weights().items()):
            if not key.startswith("fusion."):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"name": self._short_name(), "digest": digest.hexdigest(), "source": asdict(self._source())}

    def _short_name(self) -> str:
        """Return the name without local parent folders."""
        folder = local_folder(self.name)
        return self.name.removeprefix("hf-hub:") if folder is None else folder.resolve().name

    def _source(self) -> Source:
        """Return the source for the model card: of a local run, the source it was trained from; else the published checkpoint."""
        upstream = source_of_training(self._training())
        if self.is_ours and (self.folder / RUN).exists():
            return upstream
        license = self._cfg.get("license") or upstream.license
        license = license if isinstance(license, str) else None
        if local_folder(self.name) is None:
            repo = self._short_name().partition("@")[0]
            return Source(repo, repo, license)
        return Source(upstream.name or self._short_name(), upstream.hub_id, license)

    def _training(self) -> Mapping[str, Any]:
        return self.config["l2r2"].get("training", {}) if self.is_ours else {}

    def files(self, classes: Sequence[str]) -> list[str]:
        """Return the names of the images that the weights were trained on, if the checkpoint is a run with the same classes.

        Such a run was probably trained on the same data; in other data, a name like `1.jpg` would be another image.
        """
        if not (self.folder / RUN).exists() or self.labels != tuple(classes):
            return []
        record = record_of(self.folder)
        return sorted({*record.get("train_files", []), *record.get("init_files", [])})

    # ---- its weights ----

    def give(self, model: L2R2, classes: Sequence[str]) -> str:
        """Copy the weights into a model: backbones, other modules of the same shape, and the heads if the classes are the same.

        Args:
            model: a new model; changed in place.
            classes: names of its classes.

        Returns:
            A note on what was copied.

        Raises:
            L2R2Error: when the backbones differ or the weights are damaged.
        """
        state, own = self._weights(), model.state_dict()
        taken: dict[str, Tensor] = {}
        for prefix in model.backbone_prefixes():
            taken.update(self._backbone(state, model, prefix, _inside(own, prefix)))
        heads = self._heads(state, model, own) if self.labels == tuple(classes) else {}
        for head in heads.values():
            taken.update(head)
        for module in ("parts.", "box_head.", "mask_head."):
            found = {k: v for k, v in state.items() if k.startswith(module)}
            if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items() if k.startswith(module)}:
                taken.update(found)
        model.load_state_dict({**own, **taken})
        new = [branch for branch in model.branches if branch not in heads]
        parts = ["its backbone", *([f"its heads ({', '.join(heads)})"] if heads else [])]
        return f"started from {self.name}: {' and '.join(parts)}{'; new heads: ' + ', '.join(new) if new else ''}"

    def _weights(self) -> dict[str, Tensor]:
        if local_folder(self.name) is None:
            check_hash(self.folder / WEIGHTS, file_sha256(self.folder / WEIGHTS), self.name)
        try:
            return load_file(self.folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise L2R2Error(f"{self.name}: its weights cannot be read ({' '.join(str(error).split())[:200]}).") from None

    def _prefix(self, state: Mapping[str, Tensor], branch: str) -> str:
        """Return the prefix of a branch's backbone in the checkpoint."""
        own = f"branch_backbones.{branch}."
        return own if any(k.startswith(own) for k in state) else "backbone." if self.is_ours else ""

    def _backbone(self, state: Mapping[str, Tensor], model: L2R2, prefix: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        source = _inside(state, self._prefix(state, _branch_of(prefix, model)))
        misfit = f"{self.name}: the weights of {self.config['architecture']} do not fit {model.backbone_name}"
        try:
            converted = backbone_weights(source, model)
        except Exception as error:  # timm's filters fail in many ways on other networks
            raise L2R2Error(f"{misfit}.") from error
        found = {k: v for k, v in converted.items() if k in wanted and v.shape == wanted[k].shape}
        # a network without a classifier may have no norm before it
        if lacking := [k for k in wanted if k not in found and "head.norm." not in k]:
            raise L2R2Error(f"{misfit} (e.g. {lacking[0]}).")
        return {prefix + k: v for k, v in found.items()}

    def _heads(self, state: Mapping[str, Tensor], model: L2R2, own: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the head for each branch: the one trained on the backbone that the branch gets, if possible its own.

        The head of iFAM's stage 1 works on parts, so it is not used for other models.
        """
        if self.is_ours:
            of_parts = "full" if _has_parts(state) and not model.finds_object else None
            sources = {b: _inside(state, f"heads.{b}.") for b in self.config["model_args"]["branches"] if b != of_parts}
        else:
            try:
                sources = {"full": _inside(state, f"{classifier_name(model)}.")}
            except L2R2Error:  # several classifiers
                return {}
        heads = {}
        for branch in model.branches:
            prefix = self._prefix(state, branch if not model.shared else model.branches[0])
            fitting = [b for b in sources if self._prefix(state, b) == prefix]
            names = [n for n in own if n.startswith(f"heads.{branch}.")]
            for b in [*(b for b in (branch, "full") if b in fitting), *fitting]:
                if f"heads.{branch}.".startswith(model.fresh) and not _has_parts(state):
                    break
                found = {name: sources[b].get(name.split(".", 2)[2]) for name in names}
                if names and all(v is not None and v.numel() == own[name].numel() for name, v in found.items()):
                    heads[branch] = {name: v.reshape(own[name].shape) for name, v in found.items() if v is not None}
                    break
        return heads


def _branch_of(prefix: str, model: L2R2) -> str:
    """Return the branch whose backbone has this prefix; the first branch if the backbone is shared."""
    return prefix.split(".")[1] if prefix.startswith("branch_backbones.") else model.branches[0]


def _has_parts(state: Mapping[str, Tensor]) -> bool:
    return any(k.startswith("parts.") for k in state)


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

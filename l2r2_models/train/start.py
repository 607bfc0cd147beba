"""Where a training starts: the weights, and without a named model also the settings, of a checkpoint (`init` of a recipe)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..card import Source, source_of_training
from ..errors import L2R2Error
from ..files import file_sha256
from ..hub import WEIGHTS, check_config, local_folder, open_checkpoint
from ..model import L2R2
from ..zoo import PARTS, backbone_weights, classifier_name

VIEW_KEYS = ("fg", "margin", "late_stage", "late_pool", "coverage", "size")
NO_BACKBONE_KEYS = ("views", "fusion", "format_version", "in_chans", "img_size", "num_classes")


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from: one of L2R2 (a run's folder, a Hub repository), or one of a timm classifier in timm's layout.

    Attributes:
        name: what it was asked for by.
        folder: where its files are.
        config: its config.json.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def read(cls, name: str) -> Start:
        """Raises:
        L2R2Error: no checkpoint, of a newer format, with pickled weights, or not reachable.
        """
        folder, config = open_checkpoint(name)
        if "l2r2" in config:
            check_config(config, name)
        return cls(name, folder, config)

    @property
    def is_ours(self) -> bool:
        return "l2r2" in self.config

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits, empty where the checkpoint does not say them."""
        cfg = self.config.get("pretrained_cfg", {})
        return tuple(self.config.get("label_names") or cfg.get("label_names") or ())

    def recipe_keys(self) -> dict[str, Any]:
        """The keys of a `Recipe` that make a model like the checkpoint's."""
        arguments, architecture = dict(self.config.get("model_args") or {}), self.config["architecture"]
        if not self.is_ours:
            backbone = {k: v for k, v in arguments.items() if k not in NO_BACKBONE_KEYS}
            return {"model": f"timm:{architecture}", "backbone": backbone or None}
        ours = {key: arguments.pop(key) for key in ("branches", "shared", "box_head", "num_parts") if key in arguments}
        if architecture == "l2r2":
            architecture = f"timm:{arguments.pop('backbone')}"
        ours.update({key: self.config["l2r2"]["views"][key] for key in VIEW_KEYS if key in self.config["l2r2"]["views"]})
        if architecture.startswith(PARTS):
            del ours["fg"]
        recipe = self.config["l2r2"].get("training", {}).get("recipe", {})
        ours.update({key: recipe[key] for key in ("box_threshold",) if key in recipe})
        backbone = {k: v for k, v in arguments.items() if k not in NO_BACKBONE_KEYS}
        return {"model": architecture, "backbone": backbone or None, **ours}

    def normalisation(self) -> dict[str, Any]:
        """Mean, std and interpolation that the weights are used to, as in a timm pretrained cfg."""
        cfg = self.config.get("pretrained_cfg", {})
        return {key: cfg[key] for key in ("mean", "std", "interpolation") if key in cfg}

    def about(self) -> dict[str, Any]:
        """What a run records of where it started."""
        if self.is_ours:
            source = source_of_training(self.config["l2r2"].get("training", {}))
        else:
            cfg = self.config.get("pretrained_cfg", {})
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            source = Source(f"{self.config['architecture']}{tag}", cfg.get("hf_hub_id"), cfg.get("license"))
        if local_folder(self.name) is None:
            repo = self.name.removeprefix("hf-hub:").partition("@")[0]
            source = Source(repo, repo, source.licence)
        return {"name": self.name, "digest": file_sha256(self.folder / WEIGHTS), "source": asdict(source)}

    def give(self, model: L2R2, classes: Sequence[str]) -> str:
        """Put the weights into a model: those of the backbones, those of its other modules that fit, and the heads where the
        classes are the same.

        Args:
            model: a new one.
            classes: names of its classes.

        Returns:
            A sentence about what was taken.

        Raises:
            L2R2Error: another backbone, or damaged weights.
        """
        try:
            state = load_file(self.folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise L2R2Error(f"{self.name}: its weights cannot be read ({' '.join(str(error).split())[:200]}).") from None
        own, same = model.state_dict(), self.labels == tuple(classes)
        taken = self._backbones(state, model, own)
        if same:
            taken.update(self._heads(state, model))
        for module in ("parts.", "box_head."):
            found = {k: v for k, v in state.items() if k.startswith(module)}
            if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items() if k.startswith(module)}:
                taken.update(found)
        taken = {k: v for k, v in taken.items() if k in own and own[k].shape == v.shape}
        model.load_state_dict({**own, **taken})
        heads = sum(k.startswith("heads.") for k in taken)
        said = f"and heads of the same {len(classes)} classes" if heads else "the heads are new"
        return f"started from {self.name}: its backbone{' ' if heads else '; '}{said}"

    def _backbones(self, state: Mapping[str, Tensor], model: L2R2, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taken = {}
        for prefix in model.backbone_prefixes():
            source = _inside(state, prefix) or _inside(state, "backbone.") if self.is_ours else dict(state)
            wanted = _inside(own, prefix)
            found = {k: v for k, v in backbone_weights(source, model).items() if k in wanted and v.shape == wanted[k].shape}
            # a network without a classifier may have no norm before it
            if lacking := [k for k in wanted if k not in found and "head.norm." not in k]:
                other = self.config["architecture"]
                raise L2R2Error(f"{self.name}: the weights of {other} do not fit {model.backbone_name} (e.g. {lacking[0]}).")
            taken.update({prefix + k: v for k, v in found.items()})
        return taken

    def _heads(self, state: Mapping[str, Tensor], model: L2R2) -> dict[str, Tensor]:
        """Each branch's head of the same branch, or that of the whole image; stage 1 of iFAM only from stage 1."""
        if not self.is_ours:
            state = {f"heads.full.{k}": v for k, v in _inside(state, f"{classifier_name(model)}.").items()}
        taken = {}
        for branch in model.branches:
            head = f"heads.{branch}."
            if head.startswith(model.fresh) and not any(k.startswith("parts.") for k in state):
                continue
            found = _inside(state, head) or _inside(state, "heads.full.")
            taken.update({head + k: v for k, v in found.items()})
        return taken


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

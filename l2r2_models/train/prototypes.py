"""Start a training from a vision-language model (`model: vlm:...` of a recipe): its image tower and its class prototypes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.download import local_folder
from ..checkpoints.provenance import Source
from ..checkpoints.zero_shot import ZeroShotSpec, folder_of
from ..errors import L2R2Error
from ..models.cosine_head import CosineHead
from ..models.l2r2 import L2R2
from ..models.registry import backbone_weights
from ..zero_shot.prototypes import prototypes_of
from ..zero_shot.timm_tower import TimmTower, timm_tower
from ..zero_shot.towers import VisionLanguageModel, load_towers

NOT_HERE = {"fusion": "--set fusion=NAME", "fg_mode": "--fg-mode", "margin": "--set margin=NUMBER"}


@dataclass(frozen=True)
class PrototypeStart:
    """A vision-language model to start from; used like an `InitCheckpoint`.

    Attributes:
        name: the model as the recipe names it.
        spec: the model and its class names.
        folder: folder of its files.
        towers: the loaded model.
        tower: its image tower as a timm network.
    """

    name: str
    spec: ZeroShotSpec
    folder: Path
    towers: VisionLanguageModel
    tower: TimmTower
    is_ours = False

    @classmethod
    def read(cls, name: str) -> PrototypeStart:
        """Load a model from the text that names it, see `ZeroShotSpec`.

        Raises:
            L2R2Error: when it cannot be loaded, is not a network of timm, or an option belongs to the recipe.
        """
        spec = ZeroShotSpec.parse(name)
        given = {"fusion": spec.fusion != "max_confidence" or spec.fusion_file is not None}
        given.update({key: key in spec.views for key in ("fg_mode", "margin")})
        if wrong := [key for key in NOT_HERE if given[key]]:
            raise L2R2Error(
                f"{name}: {wrong[0]} is a key of the recipe when a model is trained; pass {NOT_HERE[wrong[0]]} instead."
            )
        folder = folder_of(spec.source)
        towers = load_towers(folder)
        return cls(name, spec, folder, towers, timm_tower(towers, spec.source))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the generic model `l2r2` that make the network."""
        return {"backbone": self.tower.name, **self.tower.arguments, "prototype_dim": len(self.tower.projection)}

    def views(self) -> dict[str, Any]:
        """Return the keys of a timm pretrained cfg that say which views the weights expect."""
        views = self.towers.views
        size = (3, views.size, views.size)
        return {"input_size": size, "mean": views.mean, "std": views.std, "interpolation": views.interpolation}

    def about(self) -> dict[str, Any]:
        """Return what a run records about its initialization: name, digest and source of the weights, and its prompts."""
        source = Source(**self._source())
        prompts = self.spec.prompts
        of_prompts = hashlib.sha256(json.dumps([prompts.labels, prompts.names, prompts.templates]).encode()).hexdigest()
        about = {"digest": self.towers.digest, "prompts": of_prompts, "templates": list(prompts.templates)}
        return {"name": source.name, **about, "source": asdict(source)}

    def _source(self) -> dict[str, Any]:
        if (folder := local_folder(self.spec.source)) is not None:
            return {"name": folder.resolve().name}
        repo = self.spec.source.removeprefix("hf-hub:").partition("@")[0]
        return {"name": repo, "hub_id": repo}

    def files(self, classes: Sequence[str]) -> list[str]:
        """Return no names: which images the model was trained on is unknown."""
        return []

    def give(self, model: L2R2, classes: Sequence[str]) -> str:
        """Copy the image tower into every backbone, and the prototypes of the classes into every head.

        Args:
            model: a new model, see `arguments`; changed in place.
            classes: names of its classes.

        Returns:
            A note on what was copied.

        Raises:
            L2R2Error: when a class has no name among the model's.
        """
        prompts = self.spec.prompts
        rows = {label: i for i, label in enumerate(prompts.labels)}
        if lacking := [label for label in classes if label not in rows]:
            raise L2R2Error(f'{prompts.source}: has no name for the class "{lacking[0]}" of the data set; add it.')
        own = [rows[label] for label in classes]
        chosen = replace(prompts, labels=tuple(classes), names=tuple(prompts.names[i] for i in own))
        prototypes = prototypes_of(self.towers, chosen)
        weights = backbone_weights(dict(self.tower.weights), model)  # resamples position embeddings to another size
        with torch.no_grad():
            for backbone in (model.backbone, *model.branch_backbones.values()):
                backbone.load_state_dict(weights)
            for head in model.heads.values():
                assert isinstance(head, CosineHead)
                head.projection.weight.copy_(self.tower.projection)
                head.weight.copy_(prototypes)
                head.log_scale.fill_(math.log(self.towers.scale))
        return f"started from {self.spec.source}: its image tower, and the prototypes of {len(classes)} classes as heads"

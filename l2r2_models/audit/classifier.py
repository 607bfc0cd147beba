"""Load any classifier for the audit: a timm model, a folder in timm's layout, an L2R2 run, or a Hub id."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..boxes.detections import BOX_THRESHOLD
from ..checkpoints.checkpoint import load_checkpoint
from ..checkpoints.download import local_folder, open_checkpoint
from ..checkpoints.zero_shot import is_zero_shot
from ..errors import L2R2Error
from ..fusion import with_fallback
from ..io import read_json, read_text
from ..models.l2r2 import L2R2
from ..models.weights import create_pretrained
from ..views import Views, ViewSpec

MAP_COLUMNS = ("class", "model_class")


@dataclass(frozen=True)
class Audited:
    """A classifier with its class names and preprocessing.

    Attributes:
        name: what it was loaded from.
        network: the model in eval mode.
        names: name and synonyms of each class, in the order of the logits.
        spec: how its views are cut.
        branches: the views that it takes.
        box_threshold: boxes with a lower score count as not found.
        folder: folder of a local checkpoint, else None.
        rules: changes the logits by output, e.g. to the classes that are possible; None for no change.
    """

    name: str
    network: nn.Module
    names: tuple[tuple[str, ...], ...]
    spec: ViewSpec
    branches: tuple[str, ...] = ("full",)
    box_threshold: float = BOX_THRESHOLD
    folder: Path | None = None
    rules: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    @property
    def grain(self) -> int:
        """Side of the largest view in pixels, at which noise is drawn."""
        return max(self.spec.size_of(branch) for branch in self.branches)

    @property
    def answers(self) -> tuple[str, ...]:
        """The audited outputs, the model's own prediction last: full, fg and their fusion, or its only branch."""
        if len(self.branches) == 1:
            return self.branches
        return (*(b for b in ("full", "fg") if b in self.branches), "fused")

    def __call__(self, views: Views) -> dict[str, Tensor]:
        """Return logits `[V, classes]` by output. Without an object, fg falls back to full, as in `evaluate`."""
        if not isinstance(self.network, L2R2):
            return {"full": self.network(views.full)}
        out = self.network.forward_views(**views.inputs())
        logits = with_fallback(out.branches(), out.has_fg)
        found = {name: {**logits, "fused": out.fused}[name] for name in self.answers}
        return found if self.rules is None else self.rules(found)

    def digest(self) -> str:
        """Return a SHA-256 over everything that affects its outputs."""
        fusion = self.network.fusion.config() if isinstance(self.network, L2R2) else None
        digest = hashlib.sha256(json.dumps([self.spec.to_dict(), self.branches, self.box_threshold, fusion]).encode())
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_audited(source: str | Path, labels: Path | None = None) -> Audited:
    """Load a classifier to audit.

    A plain timm model gets the whole image, padded to a square and resized (the full view of a `ViewSpec` made from its
    pretrained config), without the center crop of timm's evaluation, which would cut off objects, more or less by model.

    Args:
        source: `timm:NAME` (pretrained), a folder in timm's layout, an L2R2 run, a Hub id, or `vlm:SOURCE?names=FILE`.
        labels: file with the class names of a plain model in the order of the logits, one per line or as a JSON list.

    Raises:
        L2R2Error: when it cannot be loaded, is not an image classifier, or its class names are not known.
    """
    name = str(source)
    if name.startswith("timm:"):
        return _plain(name, _create(name, name.removeprefix("timm:")), labels)
    local = None if is_zero_shot(name) else local_folder(name)
    if not is_zero_shot(name):
        folder, config = open_checkpoint(name)
        if "l2r2" not in config:
            return _plain(name, _create(name, f"local-dir:{folder}"), labels, local)
    if labels is not None:
        raise L2R2Error(f"{name}: this model has its own class names; do not pass --labels.")
    checkpoint = load_checkpoint(source)
    model = checkpoint.model
    names = tuple((label,) for label in checkpoint.labels)
    return Audited(name, model, names, model.view_spec, model.branches, checkpoint.box_threshold, local)


def _create(name: str, model: str) -> Any:
    if not model.startswith("local-dir:") and not timm.is_model(model.split(".")[0]):
        raise L2R2Error(f'{name}: timm has no model "{model}"; `timm.list_models(pretrained=True)` lists its models.')
    try:
        return create_pretrained(model)
    except Exception as error:  # timm, huggingface_hub and safetensors each raise their own
        why = " ".join(str(error).split())[:200]
        raise L2R2Error(f"{name}: its pretrained weights cannot be loaded ({why}).") from error


def _plain(name: str, network: Any, labels: Path | None, folder: Path | None = None) -> Audited:
    cfg = dict(network.pretrained_cfg)
    classes = network.num_classes
    if isinstance(network, L2R2):
        raise L2R2Error(f"{name}: an untrained L2R2 model cannot be audited; pass a run, or the timm backbone.")
    if not classes or cfg.get("input_size", (3,))[0] != 3:
        raise L2R2Error(f"{name}: is not a classifier of RGB images; choose another model.")
    names = _names_in(labels) if labels else _names_of(cfg, classes)
    if names is None:
        raise L2R2Error(f"{name}: the names of its {classes} classes are unknown; pass --labels FILE with one name per line.")
    if len(names) != classes:
        raise L2R2Error(f"{labels or name}: {len(names)} class names for {classes} classes; list one name per class.")
    return Audited(name, network.eval(), names, ViewSpec.from_pretrained_cfg(cfg), folder=folder)


def _names_in(file: Path) -> tuple[tuple[str, ...], ...]:
    if file.suffix.lower() == ".json":
        listed = read_json(file)
        if not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
            raise L2R2Error(f"{file}: must be a JSON list of class names.")
        return tuple((n,) for n in listed)
    return tuple((line.strip(),) for line in read_text(file).splitlines() if line.strip())


def _names_of(cfg: Mapping[str, Any], classes: int) -> tuple[tuple[str, ...], ...] | None:
    """Return the class names of the checkpoint, or timm's for this number of classes (ImageNet), with synonyms."""
    if listed := cfg.get("label_names"):
        own = [listed[k] for k in sorted(listed, key=int)] if isinstance(listed, dict) else list(listed)
        described = cfg.get("label_descriptions") or {}
        about = [described.get(n) if isinstance(described, dict) else None for n in own]
        return tuple((str(n), *_synonyms(text)) for n, text in zip(own, about))
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if (subset := infer_imagenet_subset({"num_classes": classes})) is None:
        return None
    info = ImageNetInfo(subset)
    return tuple((info.index_to_label_name(i), *_synonyms(info.index_to_description(i))) for i in range(classes))


def _synonyms(text: Any) -> list[str]:
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else []


def match_classes(labels: Sequence[str], model: Audited, mapping: Path | None = None) -> dict[str, list[int]]:
    """Match the classes of the data to classes of the model.

    They are matched by name: the exact name, or else ignoring case, `_` and `-` (for ImageNet, the WordNet id or any synonym).

    Args:
        labels: classes of the data.
        model: the classifier.
        mapping: CSV file with the columns class and model_class, with several rows per class if several classes of the model
            correspond to it. Classes that it does not list are matched by name.

    Returns:
        Class indices of the model for each label.

    Raises:
        L2R2Error: when a label matches no class or several, or two labels match the same class.
    """
    wanted = {label: [label] for label in labels}
    if mapping is not None:
        given = _read_map(mapping)
        if not set(given) & set(labels):
            raise L2R2Error(f"{mapping}: lists none of the classes of the data ({_few(labels)}).")
        wanted.update({label: names for label, names in given.items() if label in wanted})
    exact, loose = _index(model.names, str), _index(model.names, _plain_name)
    found: dict[str, list[int]] = {}
    unknown, ambiguous = [], []
    for label, names in wanted.items():
        hits = [exact.get(name) or loose.get(_plain_name(name), []) for name in names]
        unknown += [name for name, hit in zip(names, hits) if not hit]
        ambiguous += [name for name, hit in zip(names, hits) if len(hit) > 1]
        found[label] = sorted({i for hit in hits for i in hit})
    remedy = f"pass --classes map.csv with the columns {','.join(MAP_COLUMNS)} (its classes: {_few(n[0] for n in model.names)})"
    if unknown:
        what = "class name matches no class" if len(unknown) == 1 else "class names match no class"
        raise L2R2Error(f"{model.name}: {len(unknown)} {what} of the model: {_few(unknown)}; {remedy}.")
    if ambiguous:
        raise L2R2Error(f"{model.name}: several classes of the model are called {_few(ambiguous)}; {remedy}.")
    uses = Counter(i for classes in found.values() for i in classes)
    if twice := [model.names[i][0] for i, n in uses.items() if n > 1]:
        raise L2R2Error(f"{model.name}: two classes of the data match its class {_few(twice)}; {remedy}.")
    return found


def _index(names: Sequence[Sequence[str]], form: Any) -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for i, own in enumerate(names):
        for name in dict.fromkeys(form(n) for n in own):
            index.setdefault(name, []).append(i)
    return index


def _plain_name(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _read_map(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in csv.DictReader(read_text(file).splitlines()):
        own, other = (row.get(column) for column in MAP_COLUMNS)
        if not own or not other:
            raise L2R2Error(f"{file}: every row needs {' and '.join(MAP_COLUMNS)}; the first line is {','.join(MAP_COLUMNS)}.")
        found.setdefault(own.strip(), []).append(other.strip())
    return found


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")

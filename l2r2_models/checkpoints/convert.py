"""Conversion of checkpoints without training: from any timm classifier, and between one model and separate networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from ..errors import L2R2Error
from ..io import read_json
from ..models.backbones import unknown_backbone
from ..models.l2r2 import L2R2
from ..models.registry import ARCHITECTURES
from ..views import ViewSpec
from .checkpoint import load_checkpoint, save_checkpoint
from .format import CONFIG

ORDER = ("full", "fg", "bg")
# fields of a ViewSpec that only affect one branch
OWN_VIEWS = {"fg": ("fg_mode", "margin", "late_stage", "late_pool", "coverage"), "bg": ("bg",)}


def derive(
    name: str,
    out: str | Path,
    *,
    labels: Sequence[str] | None = None,
    branches: Sequence[str] = ("full", "fg"),
    shared: bool = True,
    fusion: str = "robust",
) -> tuple[L2R2, tuple[str, ...]]:
    """Save an L2R2 model with the backbone and classifier of a timm model; its fg head has not been trained on crops.

    Args:
        name: a timm model, with or without a tag; its weights are downloaded if necessary.
        out: the run's folder; it must not contain a checkpoint.
        labels: one name per class; by default ImageNet's, if the weights use one of its label sets.
        branches: see `L2R2`.
        shared: see `L2R2`.
        fusion: see `L2R2`.

    Returns:
        The model, in eval mode, and its labels.

    Raises:
        L2R2Error: when the model is unknown, its weights have no classifier, the download fails, or the labels are unknown.

    >>> model, labels = derive("resnet18.a1_in1k", "runs/resnet18")  # doctest: +SKIP
    """
    out = Path(out)
    _check_free(out)
    stem = name.split(".")[0]
    if not timm.is_model(stem):
        raise L2R2Error(unknown_backbone(name))
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise L2R2Error(f"{error}") from None
    if cfg is None or not cfg.has_weights:
        raise L2R2Error(f"timm has no weights of {name}; choose a tag from timm.list_pretrained().")
    registered = f"l2r2_{stem}" if ARCHITECTURES.get(f"l2r2_{stem}") == stem else None
    architecture: dict[str, Any] = {"model_name": f"{registered}.{cfg.tag}"} if registered and cfg.tag else {}
    ours = get_pretrained_cfg(architecture["model_name"]) if architecture else cfg
    if ours is None or not ours.num_classes:
        raise L2R2Error(f"The weights of {name} have no classifier; fine-tune them instead.")
    try:
        model = cast(
            L2R2,
            timm.create_model(
                **(architecture or {"model_name": "l2r2", "backbone": name}),
                pretrained=True,
                branches=list(branches),
                shared=shared,
                fusion=fusion,
            ),
        )
    except L2R2Error:
        raise
    except Exception as error:  # from timm, torch, huggingface_hub or its HTTP client
        raise L2R2Error(f"{name}: cannot be converted ({' '.join(str(error).split())[:200]}).") from error
    model.view_spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg)
    named = tuple(labels) if labels is not None else imagenet_labels(model.num_classes, cfg.to_dict(), name)
    source = f"timm:{stem}.{cfg.tag}" if cfg.tag else f"timm:{stem}"
    save_checkpoint(model, out, named, {"derived_from": source})
    return model.eval(), named


def imagenet_labels(num_classes: int, cfg: dict[str, Any], name: str) -> tuple[str, ...]:
    """ImageNet's class names in the order of timm's weights; a name of several classes gets its WordNet id appended.

    Args:
        num_classes: the number of classes of the weights.
        cfg: the pretrained cfg of the weights.
        name: the timm model.

    Raises:
        L2R2Error: when the weights do not use one of ImageNet's label sets.

    >>> imagenet_labels(1000, {}, "resnet18")[:2]
    ('tench', 'goldfish')
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({**cfg, "num_classes": num_classes, "architecture": name})
    if not subset:
        raise L2R2Error(f"The names of the {num_classes} classes of {name} are unknown; pass --labels FILE, one name per line.")
    info = ImageNetInfo(subset)
    names = [info.index_to_description(i).split(",")[0] for i in range(num_classes)]  # the first of several synonyms
    ids = [info.index_to_label_name(i) for i in range(num_classes)]
    count = Counter(names)
    return tuple(n if count[n] == 1 else f"{n} ({i})" for n, i in zip(names, ids))


# ---- independent networks ----


@dataclass(frozen=True)
class _Part:
    """One network: its backbone's name and arguments, its weights without a prefix, its labels and views."""

    source: str
    backbone: str
    arguments: dict[str, Any]
    body: dict[str, Tensor]
    head: dict[str, Tensor]
    labels: tuple[str, ...]
    spec: ViewSpec
    in_chans: int


def join(parts: dict[str, str | Path], out: str | Path, *, fusion: str = "robust") -> L2R2:
    """Join independently trained networks into one `shared=False` model, as in the paper (`docs/method.md`, Training).

    Args:
        parts: a run, or a folder with a plain timm checkpoint, by branch (full, fg, bg). The view settings of one branch alone
            (`OWN_VIEWS`) are taken from that branch's network.
        out: the run's folder; it must not contain a checkpoint.
        fusion: see `L2R2`.

    Returns:
        The model, in eval mode.

    Raises:
        L2R2Error: when a source has several branches, or the sources differ in backbone, class names or full views.

    >>> model = join({"full": "runs/full", "fg": "runs/fg"}, "runs/joined")  # doctest: +SKIP
    """
    out = Path(out)
    _check_free(out)
    read = {branch: _read_part(str(parts[branch])) for branch in ORDER if branch in parts}
    first = next(iter(read.values()))
    for other in read.values():
        _check_alike(first, other)
    spec = first.spec
    for branch, own in OWN_VIEWS.items():
        if branch in read:
            spec = replace(spec, **{name: getattr(read[branch].spec, name) for name in own})
    model = cast(
        L2R2,
        timm.create_model(
            "l2r2",
            backbone=first.backbone,
            num_classes=len(first.labels),
            in_chans=first.in_chans,
            branches=list(read),
            shared=False,
            fusion=fusion,
            views=spec.to_dict(),
            **first.arguments,
        ),
    )
    for branch, part in read.items():
        model.backbone_of(branch).load_state_dict(part.body)
        order = [part.labels.index(label) for label in first.labels]
        # the other tensors of a head with prototypes have no rows of classes
        ordered = {key: value[order] if key in ("weight", "bias") else value for key, value in part.head.items()}
        model.heads[branch].load_state_dict(ordered)
    save_checkpoint(model, out, first.labels, {"joined_from": {b: Path(str(s)).name for b, s in parts.items()}})
    return model.eval()


def split(run: str | Path, out: str | Path) -> dict[str, Path]:
    """Split a `shared=False` model into checkpoints of one branch each, in `out/full`, `out/fg`, ...

    Args:
        run: the run's folder, or a Hub id.
        out: the folder to write to.

    Returns:
        The new folders by branch.

    Raises:
        L2R2Error: when the branches share one backbone, or one of the folders contains a checkpoint.
    """
    checkpoint = load_checkpoint(run)
    model = checkpoint.model
    if model.shared or len(model.branches) < 2:
        raise L2R2Error(f"{run}: its branches share one backbone; only a model with shared=False can be split.")
    folders = {branch: Path(out) / branch for branch in model.branches}
    for folder in folders.values():
        _check_free(folder)
    for branch, folder in folders.items():
        alone = cast(
            L2R2,
            timm.create_model(
                "l2r2",
                backbone=model.backbone_name,
                num_classes=model.num_classes,
                in_chans=model.in_chans,
                branches=[branch],
                views=model.view_spec.to_dict(),
                prototype_dim=model.prototype_dim,
                **model.backbone_kwargs,
            ),
        )
        alone.backbone.load_state_dict(model.backbone_of(branch).state_dict())
        alone.heads[branch].load_state_dict(model.heads[branch].state_dict())
        save_checkpoint(alone, folder, checkpoint.labels, checkpoint.training, localizer=checkpoint.localizer)
    return folders


def _check_free(folder: Path) -> None:
    if (folder / CONFIG).exists():
        raise L2R2Error(f"{folder}: already contains a checkpoint; choose another -o.")


def _check_alike(first: _Part, other: _Part) -> None:
    differs = [
        what
        for what, a, b in (
            ("backbones", (first.backbone, first.arguments), (other.backbone, other.arguments)),
            ("classes", sorted(first.labels), sorted(other.labels)),
            ("view sizes", (first.spec.size, first.spec.sizes), (other.spec.size, other.spec.sizes)),
            ("patches", first.spec.patch, other.spec.patch),
            ("paddings", (first.spec.square, first.spec.fill), (other.spec.square, other.spec.fill)),
            ("interpolations", first.spec.interpolation, other.spec.interpolation),
            ("normalizations", (first.spec.mean, first.spec.std), (other.spec.mean, other.spec.std)),
        )
        if a != b
    ]
    if differs:
        raise L2R2Error(f"{first.source} and {other.source} have different {' and '.join(differs)}, so they cannot be joined.")


def _read_part(source: str) -> _Part:
    folder = Path(source)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if folder.is_dir() and isinstance(config, dict) and "l2r2" not in config:
        return _read_timm(folder, config)
    checkpoint = load_checkpoint(source)
    model = checkpoint.model
    if len(model.branches) != 1:
        raise L2R2Error(f"{source}: has the branches {', '.join(model.branches)}; use a network with one branch.")
    body, head = model.backbone.state_dict(), next(iter(model.heads.values())).state_dict()
    arguments = {**model.backbone_kwargs, **({"prototype_dim": model.prototype_dim} if model.prototype_dim else {})}
    return _Part(source, model.backbone_name, arguments, body, head, checkpoint.labels, model.view_spec, model.in_chans)


def _read_timm(folder: Path, config: dict[str, Any]) -> _Part:
    """A plain timm checkpoint with `label_names`."""
    labels = config.get("label_names")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise L2R2Error(f"{folder / CONFIG}: has no label_names; add the list of class names.")
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # safetensors, torch and timm each raise their own for a damaged file
        raise L2R2Error(f"{folder}: the checkpoint cannot be loaded ({' '.join(str(error).split())[:200]}).") from error
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.out_features != len(labels):
        raise L2R2Error(f"{folder}: has no linear classifier with {len(labels)} outputs, one per label name; use another model.")
    head = dict(classifier.state_dict())
    spec = ViewSpec.from_pretrained_cfg(model.pretrained_cfg)
    in_chans = model.pretrained_cfg.get("input_size", (3,))[0]
    arguments = {k: v for k, v in config.get("model_args", {}).items() if k not in ("num_classes", "in_chans")}
    model.reset_classifier(0)
    return _Part(str(folder), config["architecture"], arguments, model.state_dict(), head, tuple(labels), spec, in_chans)

"""Create the model of a recipe, and check it before the slow steps start."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from l2r2_hub_configs import unknown_model
from torch import nn

from ..errors import L2R2Error
from ..models.backbones import early_stages
from ..models.l2r2 import L2R2
from ..models.registry import model_class
from ..views import ViewSpec
from .init import InitCheckpoint
from .prototypes import PrototypeStart
from .recipe import Recipe


def create_model(recipe: Recipe, num_classes: int, start: InitCheckpoint | PrototypeStart | None = None) -> L2R2:
    """Create the recipe's model and set how its views are cut.

    Args:
        recipe: see `Recipe`.
        num_classes: number of classes.
        start: checkpoint or vision-language model to start from; its weights are not loaded here, see `InitCheckpoint.give`.

    Returns:
        The model, with the weights of its tag if the recipe is pretrained and `start` is None.

    Raises:
        L2R2Error: when the name is unknown, settings contradict each other, the weights cannot be loaded, or the backbone does
            not take the size.
    """
    name: str = recipe.model
    backbone: dict[str, Any] = {}
    if isinstance(start, PrototypeStart):
        name, backbone = "l2r2", start.arguments()
    elif name.startswith("timm:"):
        name, backbone = "l2r2", {"backbone": name.removeprefix("timm:")}
    architecture = name.split(".")[0]
    if sentence := unknown_model(recipe.model):
        raise L2R2Error(sentence)
    try:
        cfg = timm.models.get_pretrained_cfg(backbone.get("backbone", name))
    except RuntimeError as error:
        raise L2R2Error(f"{error} `l2r2 list --pretrained` shows the tags.") from None
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = dict(
        num_classes=num_classes, branches=list(recipe.branches), shared=recipe.shared, fusion=recipe.fusion_config(), **backbone
    )
    if own := sorted({*options, "num_parts", "box_head", "mask_head", "prototype_dim"} & set(recipe.backbone or {})):
        raise L2R2Error(f"backbone: {own[0]} is not an argument of the timm backbone; set it as a recipe key.")
    options.update(recipe.backbone or {})
    options.update({key: rate for key, rate in (("drop_rate", recipe.drop), ("drop_path_rate", recipe.drop_path)) if rate})
    for head in ("box_head", "mask_head"):
        if getattr(recipe, head):
            if model_class(architecture).finds_object:
                raise L2R2Error(f"{recipe.model} finds its object itself; do not set {head}.")
            options[head] = True
    if recipe.prototype_dim:
        options["prototype_dim"] = recipe.prototype_dim
    if recipe.num_parts is not None:
        if not model_class(architecture).finds_object:
            raise L2R2Error(f"num_parts is for iFAM models, not for {recipe.model}; do not set it.")
        options["num_parts"] = recipe.num_parts
    if recipe.size and cfg is not None and cfg.fixed_input_size:
        options["img_size"] = recipe.size
    try:
        model = cast(L2R2, timm.create_model(name, pretrained=recipe.pretrained and start is None, **options))
    except L2R2Error:
        raise
    except (OSError, RuntimeError, AssertionError, ValueError, TypeError) as error:  # errors of the Hub, torch and timm
        what = " ".join(str(error).split())[:200]
        downloads = recipe.pretrained and start is None
        hint = "; without network access, pass --no-pretrained" if downloads else ""
        raise L2R2Error(f"{recipe.model} cannot be created ({what}){hint}.") from error
    changes = {name: getattr(recipe, name) for name in ("margin", "late_stage", "late_pool", "coverage")}
    names = ("bg", "square", "patch", "fill", "interpolation", "mode", "decode", "size", "sizes")
    given = {name: getattr(recipe, name) for name in names}
    changes["fg_mode"] = recipe.fg_mode or model.view_spec.fg_mode
    changes.update({name: value for name, value in given.items() if value is not None})
    from_start = start.views() if start else {}
    changes = {**(from_start if start and start.is_ours else {}), **changes}
    model.view_spec = ViewSpec.from_pretrained_cfg({**model.pretrained_cfg, **from_start}, **changes)
    fg = model.view_spec.fg
    if (recipe.mixup or recipe.cutmix) and fg.in_network:
        raise L2R2Error(f'mixup and cutmix cannot mix the masks that fg_mode "{fg.name}" needs; do not set them.')
    if (recipe.mixup or recipe.cutmix) and model.view_spec.patch:
        raise L2R2Error("mixup and cutmix cannot mix views of several aspect ratios (patch); do not set them.")
    if fg.drops_tokens and (recipe.backbone or {}).get("attn_drop_rate"):
        raise L2R2Error(f'attn_drop_rate does not work with fg_mode "{fg.name}", which drops tokens; use one or the other.')
    if recipe.consistency and not branches_with_background(model):
        raise L2R2Error("consistency needs a branch that sees object and background, full or an fg that is a crop; set it to 0.")
    if recipe.branch_backward == "separate":
        check_separable(model, frozen=recipe.trainable == "head")
    _try_out(model, recipe)
    if recipe.grad_checkpointing:
        if fg.name == "late" and recipe.late_stage == "before_last":
            raise L2R2Error("grad_checkpointing does not work with late_stage before_last; use one or the other.")
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:
            raise L2R2Error(f"{recipe.model}: its backbone has no grad_checkpointing; do not set it.") from error
    return model


def _try_out(model: L2R2, recipe: Recipe) -> None:
    """Run one forward pass, so that an unsupported size is reported before the images are read."""
    model.eval()
    try:
        with torch.inference_mode():
            spec, seen = model.view_spec, [b for b in model.branches if b != "fg" or not model.finds_object]
            views = {b: torch.zeros(2, model.in_chans, spec.size_of(b), spec.size_of(b)) for b in seen}
            mask = torch.ones(2, spec.size_of("fg"), spec.size_of("fg")) if model.takes_mask else None
            model.forward_branches(mask, **views)
    except (RuntimeError, AssertionError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise L2R2Error(f"{recipe.model} does not take views of {spec.size_words(model.branches)} ({what}).") from error
    finally:
        model.train()


def branches_with_background(model: L2R2) -> tuple[str, ...]:
    """Return the branches that classify an object together with its background: full, and an fg whose view is a plain crop."""
    fg = model.view_spec.fg
    return tuple(b for b in model.branches if b == "full" or (b == "fg" and fg.crops and not fg.erases))


def check_separable(model: L2R2, *, frozen: bool) -> None:
    """Check that the gradients of the branches can be computed one branch at a time.

    Args:
        model: the model to train.
        frozen: whether the backbones are not trained.

    Raises:
        L2R2Error: when the gradients would differ from those of all branches together, or no memory would be saved.
    """
    instead = "leave branch_backward at joint"
    if model.finds_object:
        raise L2R2Error(f"Stage 2 of an iFAM model sends its gradient through stage 1; {instead}.")
    if model.shared and model.takes_mask and model.view_spec.fg_mode == "late":
        raise L2R2Error(f'With fg_mode "late", one forward pass serves both branches, so nothing can be saved; {instead}.')
    if len({model.view_spec.size_of(branch) for branch in model.branches}) == len(model.branches):
        return  # views of other sizes go through the backbone separately anyway
    statistics = any(name.endswith("running_var") for name, _ in model.backbone.named_buffers())
    if model.shared and statistics and not frozen:
        raise L2R2Error(
            f"{model.backbone_name} has batch norm, whose statistics are those of all branches together; {instead}, "
            "or train with shared=false or trainable=head."
        )


def frozen_parts(model: L2R2, recipe: Recipe) -> list[nn.Module]:
    """Return the parts of the backbones that the recipe freezes: all of each, or the stages up to a stride.

    Raises:
        L2R2Error: when there is no such stage.
    """
    backbones: list[nn.Module] = [model.backbone, *model.branch_backbones.values()]
    if recipe.trainable == "head":
        return backbones
    if not recipe.frozen_stride:
        return []
    parts = [part for backbone in backbones for part in early_stages(backbone, recipe.frozen_stride)]
    if not parts:
        raise L2R2Error(
            f"frozen_stride {recipe.frozen_stride} freezes nothing: {recipe.model} has no stage of so small a stride before its "
            "last; use the recipe finetune."
        )
    return parts

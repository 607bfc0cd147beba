"""timm optimizers for a recipe."""

from __future__ import annotations

from difflib import get_close_matches

import timm.optim
import torch

from ..errors import L2R2Error
from ..models.l2r2 import L2R2
from .recipe import Recipe


def check_optimizer(name: str) -> None:
    """Check that timm has an optimizer of this name.

    Raises:
        L2R2Error: when there is none.
    """
    known = [str(optimizer) for optimizer in timm.optim.list_optimizers()]
    if name.lower().removeprefix("lookahead_") not in known:
        close = get_close_matches(name, known, 5)
        hint = f"close names: {', '.join(close)}" if close else "timm.optim.list_optimizers() lists them"
        raise L2R2Error(f'Unknown optimizer "{name}"; {hint}.')


def create_optimizer(model: L2R2, recipe: Recipe) -> torch.optim.Optimizer:
    """Create the recipe's optimizer for the trainable parameters.

    Norms, biases and the parameters that the backbone excludes have no weight decay.

    Raises:
        L2R2Error: when the name is unknown or timm cannot create the optimizer for this model.
    """
    check_optimizer(recipe.optimizer)
    try:
        optimizer = timm.optim.create_optimizer_v2(
            model,
            recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise L2R2Error(f"The optimizer {recipe.optimizer} cannot be created ({' '.join(str(error).split())[:200]}).") from error
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * group.get("lr_scale", 1.0)  # timm leaves this to its own schedulers
    return optimizer

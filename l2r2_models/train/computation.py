"""How a training computes: the precision, the memory layout, the compiler and the statistics of batch norm."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import distributed as processes
from ..errors import L2R2Error
from ..hardware import has_bf16
from ..models.backbones import is_convolutional
from ..models.l2r2 import L2R2
from .recipe import AUTO, Recipe

CHOSEN = ("precision", "channels_last")  # recipe keys that may be left to the hardware


def resolve(recipe: Recipe, model: L2R2, before: Mapping[str, Any]) -> Recipe:
    """Replace `auto` by what suits the hardware and the network.

    Precision is bf16 where the hardware has it, except for depthwise convolutions on a CPU, which are slower in bf16;
    convolutional backbones are channels_last.

    Args:
        recipe: see `Recipe`.
        model: the model to train.
        before: what was chosen when the run was started, which a continued run keeps; empty for a new run.

    Returns:
        The recipe without `auto`.

    Raises:
        L2R2Error: when this machine does not support what was chosen, cannot compile a model that should be compiled, or a
            model has nothing to replay as CUDA graphs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = has_bf16(device) and (device.type == "cuda" or not _has_depthwise(model.backbone))
    precision = ("bf16" if fast else "fp32") if recipe.precision == AUTO else recipe.precision
    channels_last = is_convolutional(model.backbone) if recipe.channels_last == AUTO else recipe.channels_last
    resolved = replace(recipe, **{"precision": precision, "channels_last": channels_last, **before})
    check_device(resolved)
    if recipe.compile:
        check_compiler(model)
    if recipe.cuda_graphs:
        check_graphs(model)
    return resolved


def _has_depthwise(backbone: nn.Module) -> bool:
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    return any(module.groups == module.in_channels > 1 for module in convolutions)


def check_device(recipe: Recipe) -> None:
    """Check that this machine supports the recipe's precision, graphs and batch norm, and that the model is not to be sharded.

    Raises:
        L2R2Error: when it does not.
    """
    cuda = torch.cuda.is_available()
    if recipe.precision == "fp16" and not cuda:
        raise L2R2Error("precision fp16 needs a GPU; on a CPU, use bf16 or fp32.")
    if recipe.precision == "bf16" and cuda and not has_bf16(torch.device("cuda")):
        raise L2R2Error("precision bf16 is not supported by this GPU; use fp16 or fp32.")
    if recipe.cuda_graphs and not cuda:
        raise L2R2Error("cuda_graphs needs a GPU; leave it out.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":  # what the Trainer reads
        raise L2R2Error(
            "finetune cannot save the weights of a model that FSDP has sharded; start it without use_fsdp "
            "(ACCELERATE_USE_FSDP), and save memory with branch_backward=separate or grad_checkpointing=true."
        )
    if recipe.sync_batch_norm and processes.world() > 1 and not cuda:
        raise L2R2Error("sync_batch_norm needs a GPU per process, because torch cannot synchronize on a CPU; leave it out.")


def check_compiler(model: L2R2) -> None:
    """Check that `torch.compile` works on this machine, and for this model.

    Raises:
        L2R2Error: when nothing can be compiled here, or the branches do not run the backbone's own forward pass.
    """
    heads = model.box_head is not None or model.mask_head is not None
    if heads or model.takes_mask or model.finds_object or model.view_spec.patch:
        raise L2R2Error(
            "compile has no effect with a box head or mask head, an fg that is masked inside the network, or patch; leave it out."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # torch._dynamo and torch._inductor raise many kinds
        what = " ".join(str(error).split())[:200]
        raise L2R2Error(
            f"compile needs a C++ compiler, and Triton on a GPU ({what}); install it or leave compile out."
        ) from error


def compile_backbones(model: L2R2) -> None:
    """Compile the forward pass of each backbone in place; the names of parameters stay the same."""
    for backbone in (model.backbone, *model.branch_backbones.values()):
        backbone.compile()


def check_graphs(model: L2R2) -> None:
    """Check that a model has blocks that can be replayed as CUDA graphs.

    Raises:
        L2R2Error: when it drops no tokens.
    """
    if not ("fg" in model.branches and model.view_spec.fg.drops_tokens):
        raise L2R2Error("cuda_graphs has no effect unless fg drops tokens (fg_mode tokens, or an iFAM model); leave it out.")


def check_batch_norm(model: L2R2) -> None:
    """Check that a model has batch norm whose statistics can be shared.

    Raises:
        L2R2Error: when it has none.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise L2R2Error(f"{model.backbone_name} has no batch norm; leave sync_batch_norm out.")


def synchronize_batch_norm(model: L2R2) -> None:
    """Let batch norm share its statistics across processes, in place; the names of parameters and buffers stay the same."""
    convert_sync_batchnorm(model)

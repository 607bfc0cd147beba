"""Saliency maps: which parts of a branch's view increase the score of a class, also for the fused prediction.

The fused score is attributed to the view of each branch through the fusion, with the logits of the other branches held constant.
Sources: Grad-CAM (Selvaraju et al., ICCV 2017), integrated gradients (Sundararajan et al., ICML 2017), occlusion (Zeiler and
Fergus, ECCV 2014), attention rollout (Abnar and Zuidema, ACL 2020), part maps (iFAM, `docs/method.md`, section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..boxes.detections import ViewMap
from ..errors import L2R2Error
from ..models.backbones import attention_layers, attention_of, last_map_through
from ..models.masking import coverage, patch_grid
from ..views import Views

if TYPE_CHECKING:
    from ..models.l2r2 import L2R2
    from ..models.parts import PartMaps

METHODS = ("gradcam", "ig", "occlusion", "rollout", "parts")
STEPS = 32  # steps of the path of integrated gradients
CELLS = 28  # side of the grid over which pixel-wise gradients are averaged
WINDOWS = 7  # occlusion windows per row without overlap; neighbors overlap by half
PASS = 16  # views per forward pass
Score = Callable[[Tensor], Tensor]  # views [B, C, S, S] -> [B]


@dataclass(frozen=True)
class Question:
    """The score that a map explains: why one class, and optionally why not another.

    The score is the logit of the target, minus that of `against` if given (a contrastive explanation). For a group of classes,
    the logit is the log-sum-exp of their logits.

    Attributes:
        target, against: class indices.
    """

    target: tuple[int, ...]
    against: tuple[int, ...] = ()

    def score(self, logits: Tensor) -> Tensor:
        """Compute the scores `[B]` from logits `[B, classes]`."""
        score = logits[:, list(self.target)].logsumexp(1)
        return score - logits[:, list(self.against)].logsumexp(1) if self.against else score

    def probability(self, logits: Tensor) -> Tensor:
        """Compute the softmax probability `[B]` of the target from logits `[B, classes]`."""
        return logits.softmax(1)[:, list(self.target)].sum(1)


class BranchInput(NamedTuple):
    """The view `[1, C, S, S]` of a branch, the function from such views to its logits, and its mask if it is masked inside."""

    view: Tensor
    logits: Callable[[Tensor], Tensor]
    mask: Tensor | None = None


def branch_input(model: L2R2, branch: str, views: Views) -> BranchInput:
    """Return the view of a branch for one image, and the function from views to its logits `[B, classes]`."""
    if model.finds_object:
        assert views.full is not None
        return BranchInput(views.full, lambda x: model.forward_branches(full=x)[branch])
    if branch == "fg" and views.mask is not None:
        mask, view = views.mask, views.full if views.fg is None else views.fg
        assert view is not None
        return BranchInput(view, lambda x: model.forward_branches(mask.expand(len(x), -1, -1), fg=x)["fg"], mask)
    return BranchInput(getattr(views, branch), lambda x: model.forward_branches(**{branch: x})[branch])


def default_method(model: L2R2) -> str:
    """Return the default method: part maps for iFAM models, else Grad-CAM, or integrated gradients if there is no feature map."""
    if model.finds_object:
        return "parts"
    drops = "fg" in model.branches and model.view_spec.fg.drops_tokens
    return "ig" if drops or not hasattr(model.backbone, "forward_head") else "gradcam"


def saliency(
    model: L2R2, views: Views, answer: str, question: Question, method: str, objectness: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the saliency maps of one output for one image, by branch.

    Args:
        model: the model, in eval mode.
        views: views of one image, on the model's device.
        answer: a branch, or `fused`.
        question: the score to explain; `rollout` does not depend on it.
        method: one of `METHODS`.
        objectness: `[1]`, the box's score, for fusions that use it.

    Returns:
        Maps `[h, w]` of at least 0 over the views of the branches that the output depends on, on the CPU. Their sums show how
        much each branch contributes to the score.

    Raises:
        L2R2Error: when the method is unknown, or the network does not support it.
    """
    if method not in METHODS:
        raise L2R2Error(f'Unknown method "{method}"; choose from auto, {", ".join(METHODS)}.')
    with torch.no_grad():
        out = model.forward_views(**views.inputs(), objectness=objectness)
    branch_logits, maps = out.branches(), {}
    branches = [answer] if answer != "fused" else _branches_of(model, bool(out.has_fg))
    parts_of = _weights(model, branch_logits, out.has_fg, objectness, question) if method in ("rollout", "parts") else {}
    for branch in branches:
        given = branch_input(model, branch, views)

        def score(x: Tensor, branch: str = branch, given: BranchInput = given) -> Tensor:
            z = given.logits(x)
            if answer == "fused":
                others = {b: s.expand(len(x), -1) for b, s in branch_logits.items()}
                scores = None if objectness is None else objectness.expand(len(x))
                z = model.fuse({**others, branch: z}, out.has_fg.expand(len(x)), scores)
            return question.score(z)

        values = _map_of(method, model, branch, given, score, question)
        if given.mask is not None:  # nothing outside the mask reaches this branch
            values = values * coverage(given.mask, (values.shape[0], values.shape[1]))[0]
        if answer == "fused" and parts_of:
            values = values / values.sum().clamp(min=1e-12) * parts_of[branch]
        maps[branch] = values.detach().float().clamp(min=0).cpu()
    return maps


def on_image(maps: Mapping[str, Tensor], where: Mapping[str, ViewMap], image_size: tuple[int, int]) -> Tensor:
    """Project maps `[h, w]` over views onto the image `[H, W]`, and add them up.

    The value of a cell is spread evenly over the pixels that it covers, so that the sum of a map is preserved whatever the scale
    of its view. Saliency on the padding of a view is lost.
    """
    out = torch.zeros(image_size)
    for branch, values in maps.items():
        x0, y0, x1, y1 = where[branch].canvas
        out += where[branch].map_to_image(values, image_size) * values.numel() / ((x1 - x0) * (y1 - y0))
    return out.clamp(min=0)


def _branches_of(model: L2R2, has_fg: bool) -> list[str]:
    """Return the branches that the fused prediction depends on."""
    if not has_fg and "full" in model.branches:
        return ["full"]
    over = model.fusion.over
    return [b for b in model.branches if over is None or b in over]


def _weights(
    model: L2R2, branch_logits: Mapping[str, Tensor], has_fg: Tensor, objectness: Tensor | None, question: Question
) -> dict[str, float]:
    """Return how much the fused score depends on each branch: the gradient norm of its logits, relative to the sum."""
    with torch.enable_grad():
        logits = {b: z.detach().clone().requires_grad_() for b, z in branch_logits.items()}
        score = question.score(model.fuse(logits, has_fg, objectness)).sum()
        gradients = torch.autograd.grad(score, list(logits.values()), allow_unused=True)
    norms = [0.0 if g is None else float(g.norm()) for g in gradients]
    return {b: n / max(sum(norms), 1e-12) for b, n in zip(logits, norms)}


def _map_of(method: str, model: L2R2, branch: str, given: BranchInput, score: Score, question: Question) -> Tensor:
    if method == "parts":
        return _parts(model, branch, given, question)
    if method == "rollout":
        return _rollout(model, branch, given)
    if method == "gradcam":
        return _gradcam(model, branch, given, score)
    spec = model.view_spec
    blank = torch.tensor([(f / 255 - m) / s for f, m, s in zip(spec.fill, spec.mean, spec.std)])
    baseline = blank.to(given.view)[None, :, None, None].expand_as(given.view)
    return attributions(method, score, given.view, baseline)


def attributions(method: str, score: Score, view: Tensor, baseline: Tensor) -> Tensor:
    """Compute `ig` or `occlusion` of one view `[1, C, H, W]` against a baseline of the same shape: a signed map `[h, w]`.

    A map of `ig` sums to the difference between the two scores if the sides of the view are multiples of the side of the map.
    """
    from captum.attr import IntegratedGradients, Occlusion

    side = min(view.shape[-2:])
    if method == "ig":
        found: Tensor = IntegratedGradients(score).attribute(view, baseline, n_steps=STEPS, internal_batch_size=PASS)
        cells = min(CELLS, side)
        mean = nn.functional.adaptive_avg_pool2d(found.sum(1), cells)[0]
        return (mean * (view.shape[-2] * view.shape[-1] / cells**2)).float()
    window = max(2, side // WINDOWS)
    with torch.no_grad():
        found = Occlusion(score).attribute(
            view,
            (view.shape[1], window, window),
            (view.shape[1], window // 2, window // 2),
            baseline,
            perturbations_per_eval=PASS,
        )
    return found.mean(1)[0].float()


def _gradcam(model: L2R2, branch: str, given: BranchInput, score: Score) -> Tensor:
    from captum.attr import LayerGradCam

    backbone: Any = model.backbone_of(branch)
    probe, maps = nn.Identity(), []
    if branch == "fg" and model.view_spec.fg.drops_tokens:
        raise L2R2Error(
            f"Grad-CAM needs a feature map, but this fg branch ({model.view_spec.fg_mode}) drops tokens; choose ig or occlusion."
        )
    if not hasattr(backbone, "forward_head"):
        raise L2R2Error(f"{model.backbone_name}: Grad-CAM needs a backbone of timm; choose ig or occlusion.")
    with last_map_through(backbone, probe, given.view):
        handle = probe.register_forward_hook(lambda module, inputs, out: maps.append(out))
        with torch.no_grad():
            score(given.view)
        handle.remove()
        if not maps:
            raise L2R2Error(f"{model.backbone_name}: has no feature map for Grad-CAM; choose ig or occlusion.")
        with torch.enable_grad():
            view = given.view.clone().requires_grad_()
            weighted: Tensor = LayerGradCam(score, probe).attribute(view, relu_attributions=True)
            return weighted[0, 0]


def _rollout(model: L2R2, branch: str, given: BranchInput) -> Tensor:
    """Compute attention rollout: the flow from each patch to the pooled token; attention and skip weigh the same."""
    backbone: Any = model.backbone_of(branch)
    layers = attention_layers(backbone)
    if not layers:
        raise L2R2Error(f"{model.backbone_name}: attention rollout needs a plain ViT; choose gradcam, ig or occlusion.")
    if model.finds_object or (branch == "fg" and model.view_spec.fg.drops_tokens):
        raise L2R2Error(
            f"Attention rollout needs all tokens, and fg ({model.view_spec.fg_mode}) drops some; choose ig or occlusion."
        )
    if model.view_spec.patch:
        raise L2R2Error("Attention rollout needs square views; choose gradcam, ig or occlusion.")
    with torch.no_grad(), attention_of(layers) as seen:
        given.logits(given.view)
    reached = torch.eye(seen[0].shape[-1], device=given.view.device)
    for attention in seen:  # [1, heads, N, N], the first block first
        mixed = (attention[0].float().mean(0) + torch.eye(len(reached), device=reached.device)) / 2
        reached = mixed / mixed.sum(1, keepdim=True) @ reached
    prefix = backbone.num_prefix_tokens
    row = reached[0] if backbone.global_pool == "token" else reached[prefix:].mean(0)
    grid: Tensor = row[prefix:].unflatten(0, patch_grid(backbone, *given.view.shape[-2:]))
    return grid


@torch.no_grad()
def _parts(model: L2R2, branch: str, given: BranchInput, question: Question) -> Tensor:
    """Stage 1: the part maps, weighted by how much each part raises the score above the mean class; stage 2: the kept patches."""
    if not model.finds_object:
        raise L2R2Error("Only iFAM models have part maps; choose gradcam, ig, occlusion or rollout.")
    network: Any = model
    found: PartMaps = network.find_parts(given.view)
    if branch == "fg":
        return found.keep[0].float()
    head = network.heads["full"]
    logits = head(network.parts.norm(found.vectors[0].to(network.parts.norm.weight.dtype)))  # [K, classes], one row per part
    lift = question.score(logits) - (0 if question.against else logits.mean(1))
    lift[list(network.dropped_parts)] = 0
    return (lift.clamp(min=0)[:, None, None] * found.maps[0, :-1]).sum(0)

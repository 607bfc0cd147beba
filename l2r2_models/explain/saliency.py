"""Saliency maps: where in its view a branch finds what speaks for a class, also for the fused answer.

A map of the fused answer goes through the fusion back to the view of each branch; what the other branches say is held as it is.
Sources: Grad-CAM (Selvaraju et al., ICCV 2017), integrated gradients (Sundararajan et al., ICML 2017), occlusion (Zeiler and
Fergus, ECCV 2014), attention rollout (Abnar and Zuidema, ACL 2020), part maps (iFAM, `docs/method.md`, section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..boxes.detections import ViewMap
from ..errors import L2R2Error
from ..models.backbones import last_map_through
from ..models.masking import coverage, patch_grid
from ..views import Views

if TYPE_CHECKING:
    from ..models.l2r2 import L2R2
    from ..models.parts import PartMaps

METHODS = ("gradcam", "ig", "occlusion", "rollout", "parts")
STEPS = 32  # of the path of integrated gradients
CELLS = 28  # of a side of the grid that pixel-wise gradients are averaged over
WINDOWS = 7  # that fit beside each other in a row of an occluded view; neighbors overlap by half
PASS = 16  # views in one pass
Score = Callable[[Tensor], Tensor]  # views [B, C, S, S] -> [B]


@dataclass(frozen=True)
class Question:
    """Why one class, and perhaps why not another: the score that a map explains.

    The score is the target's logit, less that of `against` where it is given (the gradient of the difference is the contrastive
    explanation). A group of classes counts as the log-sum-exp of its logits.

    Attributes:
        target, against: class numbers.
    """

    target: tuple[int, ...]
    against: tuple[int, ...] = ()

    def score(self, logits: Tensor) -> Tensor:
        """`[B, classes]` -> `[B]`."""
        score = logits[:, list(self.target)].logsumexp(1)
        return score - logits[:, list(self.against)].logsumexp(1) if self.against else score

    def probability(self, logits: Tensor) -> Tensor:
        """Softmax probability of the target, `[B, classes]` -> `[B]`."""
        return logits.softmax(1)[:, list(self.target)].sum(1)


class Look(NamedTuple):
    """What one branch sees of an image `[1, C, S, S]`, how it answers views of that kind, and the mask on its answer, if any."""

    view: Tensor
    logits: Callable[[Tensor], Tensor]
    mask: Tensor | None = None


def look_of(model: L2R2, branch: str, views: Views) -> Look:
    """The view of a branch for one image, and the function from views to its logits `[B, classes]`."""
    if model.finds_object:
        assert views.full is not None
        return Look(views.full, lambda x: model.forward_branches(full=x)[branch])
    if branch == "fg" and views.mask is not None:
        mask, view = views.mask, views.full if views.fg is None else views.fg
        assert view is not None
        return Look(view, lambda x: model.forward_branches(mask.expand(len(x), -1, -1), fg=x)["fg"], mask)
    return Look(getattr(views, branch), lambda x: model.forward_branches(**{branch: x})[branch])


def default_method(model: L2R2) -> str:
    """Part maps for an ifam model, integrated gradients where tokens are dropped, else Grad-CAM."""
    if model.finds_object:
        return "parts"
    return "ig" if "fg" in model.branches and model.view_spec.fg.drops_tokens else "gradcam"


def saliency(
    model: L2R2, views: Views, answer: str, question: Question, method: str, objectness: Tensor | None = None
) -> dict[str, Tensor]:
    """The maps of one answer for one image, by branch.

    Args:
        model: in eval mode.
        views: of one image, on the model's device.
        answer: a branch, or `fused`.
        question: the score to explain; `rollout` does not depend on it.
        method: one of `METHODS`.
        objectness: `[1]`, the box's score, for a fusion that weighs it.

    Returns:
        `[h, w]` maps over the views of the branches that the answer depends on, on the CPU, not below 0. Their sums are
        comparable: how much of the score each branch contributes.

    Raises:
        L2R2Error: an unknown method, or one that this network does not allow.
    """
    if method not in METHODS:
        raise L2R2Error(f'Unknown method "{method}"; choose from auto, {", ".join(METHODS)}.')
    with torch.no_grad():
        out = model.forward_views(**views.inputs(), objectness=objectness)
    said, maps = out.branches(), {}
    branches = [answer] if answer != "fused" else _branches_of(model, bool(out.has_fg))
    parts_of = _weights(model, said, out.has_fg, objectness, question) if method in ("rollout", "parts") else {}
    for branch in branches:
        look = look_of(model, branch, views)

        def score(x: Tensor, branch: str = branch, look: Look = look) -> Tensor:
            z = look.logits(x)
            if answer == "fused":
                others = {b: s.expand(len(x), -1) for b, s in said.items()}
                scores = None if objectness is None else objectness.expand(len(x))
                z = model.fuse({**others, branch: z}, out.has_fg.expand(len(x)), scores)
            return question.score(z)

        values = _map_of(method, model, branch, look, score, question)
        if look.mask is not None:  # nothing else reaches this branch
            values = values * coverage(look.mask, (values.shape[0], values.shape[1]))[0]
        if answer == "fused" and parts_of:
            values = values / values.sum().clamp(min=1e-12) * parts_of[branch]
        maps[branch] = values.detach().float().clamp(min=0).cpu()
    return maps


def on_image(maps: Mapping[str, Tensor], where: Mapping[str, ViewMap], image_size: tuple[int, int]) -> Tensor:
    """Maps over views `[h, w]` drawn on their image and added up: `[H, W]`.

    Each is a density: what a cell holds is spread over the pixels that it shows, so that a small object seen large weighs as much
    as it contributes. What falls on a view's padding is lost.
    """
    out = torch.zeros(image_size)
    for branch, values in maps.items():
        x0, y0, x1, y1 = where[branch].canvas
        out += where[branch].map_to_image(values, image_size) * values.numel() / ((x1 - x0) * (y1 - y0))
    return out.clamp(min=0)


def _branches_of(model: L2R2, has_fg: bool) -> list[str]:
    """The branches that the fused answer is made of."""
    if not has_fg and "full" in model.branches:
        return ["full"]
    over = model.fusion.over
    return [b for b in model.branches if over is None or b in over]


def _weights(
    model: L2R2, said: Mapping[str, Tensor], has_fg: Tensor, objectness: Tensor | None, question: Question
) -> dict[str, float]:
    """How much the fused score depends on each branch: the norm of the gradient of its logits, as a share of all."""
    with torch.enable_grad():
        logits = {b: z.detach().clone().requires_grad_() for b, z in said.items()}
        score = question.score(model.fuse(logits, has_fg, objectness)).sum()
        gradients = torch.autograd.grad(score, list(logits.values()), allow_unused=True)
    norms = [0.0 if g is None else float(g.norm()) for g in gradients]
    return {b: n / max(sum(norms), 1e-12) for b, n in zip(logits, norms)}


def _map_of(method: str, model: L2R2, branch: str, look: Look, score: Score, question: Question) -> Tensor:
    if method == "parts":
        return _parts(model, branch, look, question)
    if method == "rollout":
        return _rollout(model, branch, look)
    if method == "gradcam":
        return _gradcam(model, branch, look, score)
    spec = model.view_spec
    blank = torch.tensor([(f / 255 - m) / s for f, m, s in zip(spec.fill, spec.mean, spec.std)])
    baseline = blank.to(look.view)[None, :, None, None].expand_as(look.view)
    return attributions(method, score, look.view, baseline)


def attributions(method: str, score: Score, view: Tensor, baseline: Tensor) -> Tensor:
    """`ig` or `occlusion` of one view `[1, C, S, S]` against a baseline of its shape: a signed map `[h, w]`.

    That of `ig` sums to the difference of both scores where the side is a multiple of the map's.
    """
    from captum.attr import IntegratedGradients, Occlusion

    side = view.shape[-1]
    if method == "ig":
        found: Tensor = IntegratedGradients(score).attribute(view, baseline, n_steps=STEPS, internal_batch_size=PASS)
        cells = min(CELLS, side)
        mean = nn.functional.adaptive_avg_pool2d(found.sum(1), cells)[0]
        return (mean * (side / cells) ** 2).float()
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


def _gradcam(model: L2R2, branch: str, look: Look, score: Score) -> Tensor:
    from captum.attr import LayerGradCam

    backbone: Any = model.backbone_of(branch)
    seat, maps = nn.Identity(), []
    if branch == "fg" and model.view_spec.fg.drops_tokens:
        raise L2R2Error(
            f"Grad-CAM needs a map, and this fg branch ({model.view_spec.fg_mode}) drops tokens; choose ig or occlusion."
        )
    with last_map_through(backbone, seat, look.view):
        handle = seat.register_forward_hook(lambda module, inputs, out: maps.append(out))
        with torch.no_grad():
            score(look.view)
        handle.remove()
        if not maps:
            raise L2R2Error(f"{model.backbone_name}: has no map of features for Grad-CAM; choose ig or occlusion.")
        with torch.enable_grad():
            view = look.view.clone().requires_grad_()
            weighted: Tensor = LayerGradCam(score, seat).attribute(view, relu_attributions=True)
            return weighted[0, 0]


def _rollout(model: L2R2, branch: str, look: Look) -> Tensor:
    """How much of each patch reaches the pooled token, if attention and the skip connection carry half each."""
    backbone: Any = model.backbone_of(branch)
    layers = [getattr(block, "attn", None) for block in getattr(backbone, "blocks", ())]
    if not layers or not all(hasattr(a, "fused_attn") and hasattr(a, "attn_drop") for a in layers):
        raise L2R2Error(f"{model.backbone_name}: attention rollout needs a plain ViT; choose gradcam, ig or occlusion.")
    if model.finds_object or (branch == "fg" and model.view_spec.fg.drops_tokens):
        raise L2R2Error(
            f"Attention rollout needs all tokens, and fg ({model.view_spec.fg_mode}) drops some; choose ig or occlusion."
        )
    with torch.no_grad(), _attention_of(layers) as seen:
        look.logits(look.view)
    reached = torch.eye(seen[0].shape[-1], device=look.view.device)
    for attention in seen:  # [1, heads, N, N], the first block first
        mixed = (attention[0].float().mean(0) + torch.eye(len(reached), device=reached.device)) / 2
        reached = mixed / mixed.sum(1, keepdim=True) @ reached
    prefix = backbone.num_prefix_tokens
    row = reached[0] if backbone.global_pool == "token" else reached[prefix:].mean(0)
    grid: Tensor = row[prefix:].unflatten(0, patch_grid(backbone, *look.view.shape[-2:]))
    return grid


@contextmanager
def _attention_of(layers: Sequence[Any]) -> Iterator[list[Tensor]]:
    """Collects `[B, heads, N, N]` of every layer in the order of the pass; fused kernels, which keep none, are off meanwhile."""
    seen: list[Tensor] = []
    before = [layer.fused_attn for layer in layers]
    handles = [layer.attn_drop.register_forward_hook(lambda module, inputs, out: seen.append(out)) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
        yield seen
    finally:
        for layer, fused, handle in zip(layers, before, handles):
            layer.fused_attn = fused
            handle.remove()


@torch.no_grad()
def _parts(model: L2R2, branch: str, look: Look, question: Question) -> Tensor:
    """Stage 1: each part's map times how far it lifts the score above that of an average class; stage 2: the patches it sees."""
    if not model.finds_object:
        raise L2R2Error("Part maps belong to the ifam models; choose gradcam, ig, occlusion or rollout.")
    network: Any = model
    found: PartMaps = network.find_parts(look.view)
    if branch == "fg":
        return found.keep[0].float()
    head = network.heads["full"]
    logits = head(network.parts.norm(found.vectors[0].to(network.parts.norm.weight.dtype)))  # [K, classes], of each part alone
    lift = question.score(logits) - (0 if question.against else logits.mean(1))
    lift[list(network.dropped_parts)] = 0
    return (lift.clamp(min=0)[:, None, None] * found.maps[0, :-1]).sum(0)

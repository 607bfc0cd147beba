"""iFAM's stage 1: discovery of object parts without masks, the hard mask that results, and the losses on the parts.

Source: iFAM (Aniraj et al. 2025), implemented from the paper's description; see `docs/method.md`, iFAM. The formulas of the
presence, background and equivariance losses are reconstructed [R].
"""

# no `from __future__ import annotations`: see l2r2.py

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..errors import L2R2Error

QUANTILES = 101  # stored levels of each part's training logits: 0, 0.01, ..., 1
MAX_LOGITS = 1_000_000  # per part; more samples hardly change the quantiles


class PartMaps(NamedTuple):
    """The parts found in B images, on a grid of h x w patches.

    Attributes:
        logits: `[B, K + 1, h, w]`, minus the squared distance of each patch to each prototype; the last is the background.
        maps: `[B, K + 1, h, w]`, their softmax, with Gumbel noise in training; sums to 1 over parts and background.
        vectors: `[B, K, C]`, the map-weighted mean of the patches of each part.
        keep: `[B, h, w]` bool, the patches that stage 2 sees.
    """

    logits: Tensor
    maps: Tensor
    vectors: Tensor
    keep: Tensor

    def foreground(self) -> Tensor:
        """`[B, h, w]` in [0, 1]: how much of each patch belongs to any part."""
        return self.maps[:, :-1].sum(1)


class PartDiscovery(nn.Module):
    """K part prototypes and a background prototype over the patches of a ViT.

    Args:
        dim: channels of a patch.
        num_parts: number of parts K, at least 1.
        dropout: probability that stage 1 ignores a part in training.

    Raises:
        L2R2Error: when `num_parts` is below 1, or `dropout` is not in [0, 1).

    >>> found = PartDiscovery(dim=16, num_parts=3).eval()(torch.rand(2, 12, 16), grid=(3, 4))
    >>> found.maps.shape, found.keep.shape
    (torch.Size([2, 4, 3, 4]), torch.Size([2, 3, 4]))
    """

    quantiles: Tensor

    def __init__(self, dim: int, num_parts: int = 8, dropout: float = 0.3) -> None:
        super().__init__()
        if not isinstance(num_parts, int) or num_parts < 1:
            raise L2R2Error(f"num_parts must be at least 1, got {num_parts}.")
        if not 0 <= dropout < 1:
            raise L2R2Error(f"part_dropout must be at least 0 and below 1, got {dropout}.")
        self.num_parts, self.dropout = num_parts, dropout
        self.prototypes = nn.Parameter(torch.empty(num_parts + 1, dim))
        trunc_normal_(self.prototypes, std=0.02)
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("quantiles", torch.zeros(num_parts, QUANTILES))  # logits are negative, so 0 means not stored

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> PartMaps:
        """Find the parts among patches `[B, N, C]` of a grid `(rows, columns)`; deterministic in evaluation."""
        logits, maps, vectors, keep = assign_parts(patches, self.prototypes, self.training)
        return PartMaps(logits.unflatten(2, grid), maps.unflatten(2, grid), vectors, keep.unflatten(1, grid))

    def classify(self, vectors: Tensor, head: nn.Module, dropped: tuple[int, ...] = ()) -> Tensor:
        """Stage 1's logits `[B, classes]`: the mean over parts of one linear layer on their normalized vectors.

        Args:
            vectors: `[B, K, C]`.
            head: the layer that all parts share.
            dropped: indices of parts to ignore.
        """
        logits = head(self.norm(vectors.to(self.norm.weight.dtype)))  # [B, K, classes]
        mean: Tensor = mean_over_parts(logits, list(dropped), self.dropout if self.training else 0.0)
        return mean

    def check_intervention(self, dropped: tuple[int, ...], quantile: float) -> None:
        """Check the arguments of `without`.

        Raises:
            L2R2Error: when a part is unknown, all parts are dropped, the quantile is outside [0, 1], or none were stored.
        """
        if wrong := [k for k in dropped if not 0 <= k < self.num_parts]:
            raise L2R2Error(f"There is no part {wrong[0]}; this model has parts 0 to {self.num_parts - 1}.")
        if len(set(dropped)) == self.num_parts:  # logits of 0 would predict the first class for every image
            raise L2R2Error(f"All {self.num_parts} parts are dropped, so there is nothing to classify; keep at least one.")
        if not 0 <= quantile <= 1:
            raise L2R2Error(f"token_quantile must lie between 0 and 1, got {quantile}.")
        if quantile and not self.quantiles.any():
            raise L2R2Error("This checkpoint has no quantiles of part logits; use one that `l2r2 finetune` has finished.")

    def without(self, found: PartMaps, dropped: tuple[int, ...], quantile: float) -> PartMaps:
        """Remove the patches of some parts, and those of low confidence, from the mask.

        Args:
            found: the output of `forward`.
            dropped: indices of parts, 0 to K - 1.
            quantile: drop patches whose logit is below this quantile of their part's training logits; 0 drops none.

        Returns:
            `found` with the new `keep`.
        """
        best, part = found.logits.max(1)  # [B, h, w]
        keep = found.keep & ~torch.isin(part, torch.tensor(dropped, dtype=part.dtype, device=part.device))
        if quantile:
            levels = self.quantiles[:, round(quantile * (QUANTILES - 1))]
            keep = keep & (best >= F.pad(levels, (0, 1), value=math.inf)[part])
        return found._replace(keep=keep)

    @torch.no_grad()
    def store_quantiles(self, batches: Iterable[PartMaps]) -> None:
        """Store the quantiles of each part's logits over the patches assigned to it; 0, which drops all, if there are none."""
        won: list[list[Tensor]] = [[] for _ in range(self.num_parts)]
        for found in batches:
            best, part = found.logits.max(1)
            for k in range(self.num_parts):
                won[k].append(best[part == k].float().cpu())
        levels = torch.linspace(0, 1, QUANTILES)
        for k, logits in enumerate(map(torch.cat, won)):
            few = logits[:: max(1, -(-len(logits) // MAX_LOGITS))]
            self.quantiles[k] = torch.quantile(few, levels).to(self.quantiles) if len(few) else 0.0


# each is one node of an FX graph, and stays Python when such a graph is scripted


@torch.fx.wrap
@torch.jit.ignore
def assign_parts(patches: Tensor, prototypes: Tensor, noise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign patches to parts, see `PartMaps`.

    Args:
        patches: `[B, N, C]`.
        prototypes: `[K + 1, C]`.
        noise: whether to add Gumbel noise to the logits, as in training.

    Returns:
        Logits `[B, K + 1, N]`, maps `[B, K + 1, N]`, vectors `[B, K, C]` and keep `[B, N]`.
    """
    kind = patches.device.type
    on = torch.is_autocast_enabled(kind) if kind != "meta" else False  # differences of large squares need float32
    with torch.autocast(kind if kind != "meta" else "cpu", enabled=False) if on else nullcontext():
        x, prototypes = patches.float(), prototypes.float()
        distances = x.square().sum(2, keepdim=True) - 2 * x @ prototypes.T + prototypes.square().sum(1)
        logits = -distances.transpose(1, 2)  # [B, K + 1, N]
        drawn = logits - torch.empty_like(logits).exponential_().clamp_min(1e-10).log() if noise else logits
        maps = drawn.softmax(1)
        weights = maps[:, :-1] / maps[:, :-1].sum(2, keepdim=True).clamp_min(1e-6)
        vectors = weights @ x
    return logits, maps, vectors, drawn.argmax(1) < len(prototypes) - 1


@torch.fx.wrap
@torch.jit.ignore
def mean_over_parts(logits: Tensor, dropped: list[int], dropout: float) -> Tensor:
    """Average logits `[B, K, classes]` over the parts that are neither `dropped` nor dropped at random: `[B, classes]`."""
    weights = torch.ones_like(logits[:, :, 0], dtype=torch.float32)  # one per row, so that export keeps the batch dynamic
    if dropped:  # OpenVINO cannot read a scatter of nothing
        weights[:, dropped] = 0.0
    if dropout > 0:
        draws = weights * (torch.rand_like(weights) >= dropout)
        weights = torch.where(draws.sum(1, keepdim=True) > 0, draws, weights)  # never drop all parts
    return ((logits * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)).to(logits.dtype)


@dataclass(frozen=True)
class PartWeights:
    """Weights of the losses on the parts (`docs/method.md`, iFAM); 0 omits a loss.

    Raises:
        L2R2Error: when a weight is negative or not finite.
    """

    presence: float = 1.0
    equivariance: float = 1.0
    variation: float = 1.0
    entropy: float = 1.0
    orthogonality: float = 1.0
    background: float = 2.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise L2R2Error(f"part_{name} must be a weight of at least 0, got {weight!r}.")


def part_losses(found: PartMaps, weights: PartWeights, image: Tensor, stage1: Callable[[Tensor], PartMaps]) -> dict[str, Tensor]:
    """The weighted losses by name, without those of weight 0.

    Args:
        found: the parts of the images.
        weights: the weights of the losses.
        image: the images `[B, C, S, S]`.
        stage1: finds the parts in images; called once, on transformed images, for the equivariance loss.
    """
    terms: dict[str, Callable[[], Tensor]] = {
        "presence": lambda: presence_loss(found.maps),
        "equivariance": lambda: equivariance_loss(found.maps, image, stage1),
        "variation": lambda: variation_loss(found.maps),
        "entropy": lambda: entropy_loss(found.maps),
        "orthogonality": lambda: orthogonality_loss(found.vectors),
        "background": lambda: background_loss(found.maps),
    }
    return {name: weight * terms[name]() for name, weight in asdict(weights).items() if weight}


def presence_loss(maps: Tensor) -> Tensor:
    """Encourage each part to occur in the batch: 1 minus the mean over parts of the largest smoothed value of its map [R].

    Args:
        maps: `[B, K + 1, h, w]`, the background last; likewise in the other losses.

    >>> presence_loss(torch.full((2, 4, 6, 6), 0.25))
    tensor(0.7500)
    """
    return 1 - _smooth(maps[:, :-1]).amax((0, 2, 3)).mean()


def background_loss(maps: Tensor) -> Tensor:
    """Encourage background near each image's edges: -log of its largest smoothed value, weighted 1 in corners, 0 inside [R]."""
    rows, columns = (torch.linspace(-1, 1, n, device=maps.device).square() for n in maps.shape[2:])
    edge = (rows[:, None] + columns[None]) / 2
    return -(_smooth(maps[:, -1:])[:, 0] * edge).amax((1, 2)).clamp_min(1e-6).log().mean()


def variation_loss(maps: Tensor) -> Tensor:
    """Total variation: the mean absolute difference of neighbors, summed over both directions."""
    return sum((maps.diff(dim=d).abs().sum(1).mean() for d in (2, 3) if maps.shape[d] > 1), maps.new_zeros(()))


def entropy_loss(maps: Tensor) -> Tensor:
    """Encourage each patch to belong to one part: the mean entropy over parts and background, relative to its maximum."""
    return -(maps * maps.clamp_min(1e-8).log()).sum(1).mean() / math.log(maps.shape[1])


def orthogonality_loss(vectors: Tensor) -> Tensor:
    """Encourage parts to differ: the mean absolute cosine between the vectors `[B, K, C]` of an image; 0 for one part."""
    parts = vectors.shape[1]
    if parts < 2:
        return vectors.new_zeros(())
    cosines = F.normalize(vectors, dim=2) @ F.normalize(vectors, dim=2).transpose(1, 2)  # [B, K, K]
    others = ~torch.eye(parts, dtype=torch.bool, device=vectors.device)
    return cosines[:, others].abs().mean()


def equivariance_loss(maps: Tensor, image: Tensor, stage1: Callable[[Tensor], PartMaps]) -> Tensor:
    """Encourage parts to move with the image: 1 minus the mean cosine of the moved maps and the maps of the moved image [R].

    Each image gets a random rotation up to 30 degrees, shift up to a tenth of the side, and scale from 0.8 to 1.25.
    """
    theta = draw_moves(len(image), image.device)
    moved = stage1(move(image, theta)).maps
    inside = move(torch.ones_like(maps[:, :1]), theta) > 0.99
    expected = (move(maps, theta) * inside)[:, :-1].flatten(2)
    return 1 - F.cosine_similarity(expected, (moved * inside)[:, :-1].flatten(2), dim=2, eps=1e-6).mean()


def draw_moves(count: int, device: Any = None) -> Tensor:
    """Draw random rotations, shifts and scales `[B, 2, 3]` for `affine_grid`."""
    angle = (torch.rand(count, device=device) * 2 - 1) * math.pi / 6
    scale = torch.exp((torch.rand(count, device=device) * 2 - 1) * math.log(1.25))
    shift = (torch.rand(count, 2, device=device) * 2 - 1) * 0.2  # the side has length 2
    cos, sin = scale * angle.cos(), scale * angle.sin()
    return torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)


def move(x: Tensor, theta: Tensor) -> Tensor:
    """Transform images or maps `[B, C, h, w]` by `theta` `[B, 2, 3]`, with 0 outside."""
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode="zeros", align_corners=False)


def _smooth(maps: Tensor) -> Tensor:
    """Average over 3 x 3 patches, because a single patch is not a part."""
    return F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)

"""A head that compares an embedding with class prototypes, as CLIP does, and can be trained further."""

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.functional import normalize

SCALE = 1 / 0.07  # of CLIP at the start of its training


class CosineHead(nn.Module):
    """Logits from the cosine similarity of a projected feature and the class prototypes: `scale * cos(projection(x), weight)`.

    Args:
        features: number of input features D.
        dim: dimension E of the embedding.
        classes: number of classes.

    >>> CosineHead(8, 4, 3)(torch.rand(2, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(self, features: int, dim: int, classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, dim, bias=False)
        self.weight = nn.Parameter(torch.empty(classes, dim))  # named as in nn.Linear, so that timm can replace the classes
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `[B, classes]` of features `[B, D]`."""
        cosine = normalize(self.projection(x), dim=-1) @ normalize(self.weight, dim=-1).t()
        return cosine * self.log_scale.exp()

"""Groups of rows, a class with a value of a metadata column each, and the weights that GroupDRO gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.table import ImageTable

GROUP_STEP = 0.01


def groups_of(table: ImageTable, column: str) -> list[int]:
    """Return the group index of each row; the groups are the combinations of label and value that occur, in sorted order.

    Args:
        table: rows with labels.
        column: a metadata column.

    Raises:
        L2R2Error: when a row does not have the column.
    """
    pairs = _pairs(table, column)
    index = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
    return [index[pair] for pair in pairs]


def count_groups(table: ImageTable, column: str) -> dict[str, int]:
    """Return the number of rows per group, by `label / value`; see `groups_of`."""
    return {" / ".join(pair): count for pair, count in sorted(Counter(_pairs(table, column)).items())}


def _pairs(table: ImageTable, column: str) -> list[tuple[str, str]]:
    return [(str(row.label), value) for row, value in zip(table.rows, table.column(column))]


class GroupDRO(nn.Module):
    """Weights of groups that follow their losses by exponentiated gradient ascent, separately for each branch.

    Each training step multiplies the weight of a group by `exp(step * loss)`, with the mean loss of its rows in the batch (0 if
    there are none), and then normalizes the weights to sum to 1. Source: Sagawa et al., "Distributionally Robust Neural Networks
    for Group Shifts" (arXiv 1911.08731), algorithm 1; see `docs/method.md`, section 3.

    Args:
        branches: names of the branches.
        count: number of groups.
        step: step size.

    >>> dro = GroupDRO(["full"], count=2, step=1.0)
    >>> dro("full", torch.tensor([0.0, 2.0]), torch.tensor([True, True]), torch.tensor([0, 1]))
    tensor(1.7616)
    >>> dro.full
    tensor([0.1192, 0.8808])
    """

    def __init__(self, branches: Sequence[str], count: int, step: float) -> None:
        super().__init__()
        self.count, self.step = count, step
        for branch in branches:
            self.register_buffer(branch, torch.full((count,), 1 / count))

    def forward(self, branch: str, losses: Tensor, rows: Tensor, groups: Tensor) -> Tensor:
        """Update the weights of a branch, and return its loss, the weighted sum of the groups' mean losses.

        Args:
            branch: name of the branch.
            losses: `[B]` loss of each row.
            rows: `[B]` bool, the rows that count for the branch.
            groups: `[B]` group indices.
        """
        member = nn.functional.one_hot(groups, self.count).T.float() * rows  # [G, B]
        means = member @ losses / member.sum(1).clamp(min=1)
        weights: Tensor = getattr(self, branch)
        with torch.no_grad():
            weights.copy_(torch.softmax(weights.log() + self.step * means, 0))
        return (weights.clone() * means).sum()
